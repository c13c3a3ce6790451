"""Laws of adapters: they change nothing at first, they alone are trained, and merged they are the same model."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from stages.nets import lora
from stages.nets.components import Components, load_components
from stages.nets.features import feature_widths, last_resnets
from stages.nets.lora import (
    LoraConfig,
    adapter_parameters,
    add_adapters,
    load_adapters,
    lora_state_dict,
    merge_adapters,
)
from stages.nets.run_folder import BASE_FILE, WEIGHTS_FILE, Origin, load_student, open_run, save_base
from stages.nets.student import Prediction, Student
from stages.system.refusal import Refused
from stages.train.optim import block_of

ALL = LoraConfig(rank=3, alpha=6, modules=("attention", "feed_forward", "resnet"))
ORIGIN = Origin("stages/tiny/model", {}, "hold", "abc")


@pytest.fixture(scope="module")
def parts() -> Components:
    return load_components("stages/tiny/model", torch.device("cpu"), torch.float32)


@pytest.fixture
def student(parts: Components) -> Student:
    return Student.from_teacher(parts.unet).eval()


def stir(student: Student) -> dict[str, Tensor]:
    """Set the adapters to values that training could have produced, and return these."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in adapter_parameters(student).values():
            value.copy_(torch.randn(value.shape, generator=generator) / 10)
    return {name: value.detach().clone() for name, value in adapter_parameters(student).items()}


@torch.no_grad()
def predict(student: Student) -> Prediction:
    generator = torch.Generator().manual_seed(0)
    x, cond = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 64, generator=generator)
    return student(x, torch.tensor([0.2, 0.8]), cond, torch.zeros(1, 5, 64))


def test_fresh_adapters_change_nothing_to_the_bit(student: Student) -> None:
    before = predict(student)
    after = predict(add_adapters(student, ALL))
    assert torch.equal(before.v_cond, after.v_cond)
    assert all(torch.equal(before.features[block], after.features[block]) for block in student.blocks)


def test_only_adapters_get_gradients_and_each_lies_in_its_block(student: Student) -> None:
    add_adapters(student, LoraConfig(rank=2))
    v = student(torch.randn(1, 4, 8, 8), torch.tensor([0.5]), torch.randn(1, 5, 64), torch.zeros(1, 5, 64)).v_cond
    v.square().sum().backward()
    learning = {name for name, value in student.named_parameters() if value.grad is not None}
    assert learning == adapter_parameters(student).keys()
    assert all(name.split(".lora_")[0].endswith(lora.LAYER_SUFFIXES["attention"]) for name in learning)
    with_attention = {"down_0", "down_1", "down_2", "mid", "up_1", "up_2", "up_3"}
    assert {block_of(name) for name in learning} == with_attention


def test_adapters_begin_alike_whatever_was_drawn_before(parts: Components) -> None:
    first = add_adapters(Student.from_teacher(parts.unet), LoraConfig(rank=2))
    torch.rand(5)
    second = add_adapters(Student.from_teacher(parts.unet), LoraConfig(rank=2))
    pairs = zip(adapter_parameters(first).values(), adapter_parameters(second).values(), strict=True)
    assert all(torch.equal(left, right) for left, right in pairs)


def test_merged_adapters_are_the_same_field_to_rounding_under_the_plain_names(student: Student) -> None:
    names = set(student.state_dict())
    plain = predict(student)
    stir(add_adapters(student, ALL))
    beside = predict(student)
    within = predict(merge_adapters(student))
    assert set(student.state_dict()) == names
    assert (beside.v_cond - plain.v_cond).abs().max() > 0.05  # they do change it
    torch.testing.assert_close(within.v_cond, beside.v_cond, atol=2e-5, rtol=1e-5)
    assert within.features.keys() == beside.features.keys() == set(student.blocks)


def test_the_tap_and_the_widths_know_blocks_with_adapters(student: Student) -> None:
    before = feature_widths(student.unet)
    add_adapters(student, ALL)
    assert feature_widths(student.unet) == before
    assert list(last_resnets(student.unet)) == list(before)


def test_the_scale_lies_within_the_layers_that_others_read(student: Student) -> None:
    own = stir(add_adapters(student, ALL))
    stored = lora_state_dict(student, ALL.scale)
    name = next(name for name in own if ".lora_B." in name)
    assert torch.equal(stored[name.replace(".default.", ".")], 2 * own[name])
    assert all(name.startswith("unet.") for name in stored)


def test_without_peft_adapters_are_refused(student: Student, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora, "find_spec", lambda _name: None)
    with pytest.raises(Refused, match=r"pip install 'sollune\[lora\]'"):
        add_adapters(student, ALL)


def test_adapters_of_another_rank_are_not_taken(student: Student, parts: Components) -> None:
    other = stir(add_adapters(Student.from_teacher(parts.unet), LoraConfig(rank=2)))
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_adapters(add_adapters(student, LoraConfig(rank=3)), other)


def run_of(folder: Path, student: Student, config: LoraConfig = ALL) -> Origin:
    """A run folder whose one checkpoint holds adapters; they stay beside the student's weights."""
    origin = ORIGIN.with_lora(config)
    save_base(folder, origin, student)
    origin.save(folder)
    checkpoint = folder / "checkpoints" / "000000064"
    checkpoint.mkdir(parents=True)
    save_file(stir(add_adapters(student, config)), checkpoint / WEIGHTS_FILE)
    return origin


def test_a_run_of_adapters_opens_as_the_merged_model(tmp_path: Path, student: Student, parts: Components) -> None:
    run_of(tmp_path, student)
    opened = load_student(open_run(tmp_path), parts)
    expected = merge_adapters(student).state_dict()
    assert opened.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in opened.state_dict().items())
    assert not any(parameter.requires_grad for parameter in opened.parameters())


def test_a_run_goes_on_only_with_the_adapters_and_the_base_that_it_began_with(
    tmp_path: Path, student: Student, parts: Components
) -> None:
    origin, base = run_of(tmp_path, student), Student.from_teacher(parts.unet)
    before = (tmp_path / BASE_FILE).read_bytes()
    save_base(tmp_path, origin, base)
    with pytest.raises(Refused, match="was begun with lora = "):
        save_base(tmp_path, replace(origin, lora=None), base)
    with torch.no_grad():
        base.unet.conv_in.bias += 1
    with pytest.raises(Refused, match="is not the model that this run goes on from"):
        save_base(tmp_path, origin, base)
    assert (tmp_path / BASE_FILE).read_bytes() == before
    assert Origin.open(tmp_path) == origin


def test_a_lost_base_is_refused_and_written_again(tmp_path: Path, student: Student, parts: Components) -> None:
    origin = run_of(tmp_path, student)
    (tmp_path / BASE_FILE).write_bytes(b"broken")
    with pytest.raises(Refused, match="start the run's command again, it writes it"):
        load_student(open_run(tmp_path), parts)
    save_base(tmp_path, origin, Student.from_teacher(parts.unet))
    load_student(open_run(tmp_path), parts)
