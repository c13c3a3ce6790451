"""Laws of the guidance scale as an input of the network."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file

from stages.nets.components import Components, load_components
from stages.nets.guidance import (
    EMBEDDING_DIM,
    PROJECTION_KEY,
    embed_guidance,
    fold_guidance,
    guidance_embedding,
    slow_columns,
)
from stages.nets.run_folder import Origin, SavedRun, load_student
from stages.nets.student import Student
from stages.system.refusal import Refused

X = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
S = torch.tensor([0.999, 0.5, 0.1])
COND = torch.randn(3, 2, 64, generator=torch.Generator().manual_seed(1))
W = torch.tensor([1.0, 4.5, 8.0])
ORIGIN = Origin("teacher", {}, "hold", "0" * 64)


@pytest.fixture(scope="module")
def parts() -> Components:
    return load_components("stages/tiny/model", torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def trained(parts: Components) -> UNet2DConditionModel:
    """A network with a projection other than zero."""
    unet = embed_guidance(parts.unet)
    torch.nn.init.normal_(unet.time_embedding.cond_proj.weight, std=0.1, generator=torch.Generator().manual_seed(2))
    return unet.eval()


@pytest.mark.parametrize("dim", [256, 512, 6])
def test_the_embedding_is_that_of_stock_pipelines(dim: int) -> None:
    stock = StableDiffusionPipeline.get_guidance_scale_embedding(None, W - 1, embedding_dim=dim)
    torch.testing.assert_close(guidance_embedding(W, dim), stock, atol=0, rtol=0)


def test_slow_columns_change_slowly_with_the_scale() -> None:
    w = torch.linspace(1, 8, 8)
    change = (guidance_embedding(w)[1:] - guidance_embedding(w)[:-1]).abs().amax(0)
    slow = slow_columns()
    assert slow.shape == (EMBEDDING_DIM,)
    assert 0 < int(slow.sum()) < EMBEDDING_DIM
    assert float(change[slow].max()) <= 2**0.5 + 1e-3  # a quarter of a wavelength for a step of 1


def test_an_embedded_network_begins_with_the_outputs_of_the_plain_one(parts: Components) -> None:
    plain, embedded = Student(parts.unet), Student(embed_guidance(parts.unet).eval())
    assert (plain.embeds_guidance, embedded.embeds_guidance) == (False, True)
    with torch.no_grad():
        assert torch.equal(embedded.velocity(X, S, COND, W), plain.velocity(X, S, COND))


def test_an_embedded_network_can_be_embedded_again(trained: UNet2DConditionModel) -> None:
    again = embed_guidance(trained)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in trained.state_dict().items())


@pytest.mark.parametrize("w", [1.0, 3.0, 7.5])
def test_a_folded_network_is_a_plain_one_at_one_scale(
    parts: Components, trained: UNet2DConditionModel, w: float
) -> None:
    folded = fold_guidance(trained, w).eval()
    assert {**folded.config} == {**parts.unet.config}
    assert folded.state_dict().keys() == parts.unet.state_dict().keys()
    with torch.no_grad():
        expected = Student(trained).velocity(X, S, COND, torch.full((3,), w))
        other = Student(trained).velocity(X, S, COND, torch.full((3,), w + 1))
        output = Student(folded).velocity(X, S, COND)
    torch.testing.assert_close(output, expected, atol=2e-5, rtol=2e-5)
    assert not torch.allclose(other, expected, atol=1e-3)


def test_one_pass_gives_one_branch_and_no_features(trained: UNet2DConditionModel) -> None:
    student, rows = Student(trained), []
    trained_hook = student.unet.register_forward_pre_hook(lambda _unet, inputs: rows.append(len(inputs[0])))
    with torch.no_grad():
        output = student(X, S, COND, torch.zeros(1, 2, 64), W)
    trained_hook.remove()
    assert rows == [3]
    assert torch.equal(output.v_cond, output.v_uncond)
    assert output.features == {}
    assert not student.feature_tap.pop_features(slice(None))


def test_a_scale_is_given_exactly_to_networks_that_take_one(parts: Components, trained: UNet2DConditionModel) -> None:
    for unet, guidance in ((parts.unet, W), (trained, None)):
        with pytest.raises(AssertionError):
            Student(unet).velocity(X, S, COND, guidance)


def test_training_moves_slow_columns_alone(parts: Components) -> None:
    student = Student.from_teacher(embed_guidance(parts.unet)).train()
    student.velocity(X, S, COND, W).square().mean().backward()
    gradient = student.unet.time_embedding.cond_proj.weight.grad
    assert gradient is not None
    assert not gradient[:, ~slow_columns()].any()
    assert bool(gradient[:, slow_columns()].abs().amax() > 0)


def test_a_run_of_windows_loads_its_network_with_the_projection(
    parts: Components, trained: UNet2DConditionModel, tmp_path: Path
) -> None:
    weights = tmp_path / "ema.safetensors"
    save_file({f"unet.{name}": value.contiguous() for name, value in trained.state_dict().items()}, weights)
    fast = replace(ORIGIN, windows=4, guidance_range=(3.0, 8.0))
    student = load_student(SavedRun(tmp_path, fast, weights, 1), parts)
    assert torch.equal(student.unet.get_parameter(PROJECTION_KEY), trained.get_parameter(PROJECTION_KEY))
    with pytest.raises(Refused, match="not the student's weights"):
        load_student(SavedRun(tmp_path, ORIGIN, weights, 1), parts)


def test_an_origin_keeps_its_windows_and_old_ones_have_none(tmp_path: Path) -> None:
    fast = replace(ORIGIN, windows=2, guidance_range=(3.0, 8.0))
    fast.save(tmp_path)
    assert Origin.open(tmp_path) == fast
    content = json.loads((tmp_path / "origin.json").read_text())
    del content["windows"], content["guidance_range"]
    (tmp_path / "origin.json").write_text(json.dumps(content))
    assert Origin.open(tmp_path) == replace(fast, windows=None, guidance_range=None)


@pytest.mark.parametrize(
    "change", [{"windows": None}, {"guidance_range": None}, {"windows": 0}, {"windows": -4}, {"windows": "x"}]
)
def test_an_origin_with_broken_windows_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    replace(ORIGIN, windows=2, guidance_range=(3.0, 8.0)).save(tmp_path)
    content = json.loads((tmp_path / "origin.json").read_text())
    (tmp_path / "origin.json").write_text(json.dumps({**content, **change}))
    with pytest.raises(Refused, match=r"origin\.json: cannot be read"):
        Origin.open(tmp_path)


def test_a_teacher_whose_config_is_silent_of_the_guidance_input_gets_one(parts: Components, tmp_path: Path) -> None:
    """As the configs of SD1.5 are, which are older than that entry."""
    parts.unet.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["time_cond_proj_dim"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    silent = UNet2DConditionModel.from_pretrained(tmp_path)
    assert "time_cond_proj_dim" in silent.config["_use_default_values"]
    assert embed_guidance(silent).config.time_cond_proj_dim == embed_guidance(parts.unet).config.time_cond_proj_dim
