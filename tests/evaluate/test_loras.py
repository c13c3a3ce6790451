"""LoRAs made for the teacher, measured on students of which it is known what becomes of them."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from stages.evaluate.lora import LoraInputs, LoraMeasurement, measure_lora, open_measured_loras
from stages.evaluate.lora_effect import BIN_EDGES, compare_effects
from stages.evaluate.lora_file import ScaledLora
from stages.evaluate.lora_report import correction_text
from stages.evaluate.lora_weights import applied, compare_with_stock, open_for
from stages.evaluate.measure import main
from stages.export.history import read_history
from stages.export.measured_loras import lora_table, read_measured_loras
from stages.nets.components import load_components
from stages.nets.student import Student, make_vp_bridge
from stages.nets.teacher import Teacher
from stages.sampling.sampler import Sampler
from stages.system.refusal import Refused
from stages.teacher_files.source import TeacherSource
from tests import lora_files as made

TEXTS = [f"a {colour} {shape}" for colour in ("red", "blue") for shape in ("star", "ring", "moon", "heart")]
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("text", "file", "scale"),
    [
        ("style.safetensors", "style.safetensors", 1),
        ("style.safetensors:.8", "style.safetensors", 0.8),
        ("style.safetensors:-1", "style.safetensors", -1),
        ("style:1e-1", "style", 0.1),
        (r"C:\loras\style.safetensors", r"C:\loras\style.safetensors", 1),
        (r"C:\loras\style.safetensors:2", r"C:\loras\style.safetensors", 2),
        ("hub:owner/name", "hub:owner/name", 1),
        ("12:30 o'clock.safetensors", "12:30 o'clock.safetensors", 1),
        ("a:b:0.5", "a:b", 0.5),
        ("1:2:3", "1:2", 3),
        ("style:", "style:", 1),
        ("style:0,8", "style:0,8", 1),
        ("style:1_0", "style:1_0", 1),
        ("style:٣", "style:٣", 1),
    ],
)
def test_a_text_is_split_at_its_last_colon_if_a_number_follows(text: str, file: str, scale: float) -> None:
    lora = ScaledLora.model_validate(text)
    assert (lora.file, lora.scale) == (file, scale)


@pytest.mark.parametrize("scale", ["0", "-0.0", "nan", "inf", "-Infinity", "1e999"])
def test_a_scale_that_is_zero_or_not_finite_is_refused_as_a_scale(scale: str) -> None:
    with pytest.raises(ValidationError, match=r"scale|finite"):
        ScaledLora.model_validate(f"style.safetensors:{scale}")


def test_effects_are_told_apart_by_branch_and_time() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(2, 5, 3, 4, 5, generator=generator)
    s = torch.tensor([0.1, 0.4, 0.7, 0.85, 0.95], dtype=torch.float64)
    factors = torch.tensor([1.0, 0.5, -2.0, 0.0, 3.0]).reshape(5, 1, 1, 1)
    conditional, unconditional = compare_effects(torch.stack([factors * teacher[0], teacher[1] / 4]), teacher, s)
    assert [effect.slope for effect in conditional.by_bin] == pytest.approx([1, 0.5, -2, 0, 3])
    assert [effect.ratio for effect in conditional.by_bin] == pytest.approx([1, 0.5, 2, 0, 3])
    assert [conditional.by_bin[2].cosine, conditional.by_bin[3].cosine] == [pytest.approx(-1), None]
    assert [unconditional.overall.ratio, unconditional.overall.cosine] == pytest.approx([0.25, 1])
    assert len(conditional.by_bin) == len(BIN_EDGES) - 1


def test_without_any_effect_on_the_teacher_there_is_nothing_to_compare() -> None:
    effect, _ = compare_effects(torch.ones(2, 3, 1, 2, 2), torch.zeros(2, 3, 1, 2, 2), torch.full((3,), 0.5).double())
    assert (effect.overall.ratio, effect.overall.slope, effect.overall.cosine) == (None, None, None)
    assert effect.by_bin[4].ratio is None


def lora_file(folder: Path, *suffixes: str, name: str = "style", scale: float = 1.0) -> ScaledLora:
    file = made.write(made.kohya(made.random_pairs(*suffixes)), folder / f"{name}.safetensors")
    return ScaledLora(file=str(file), scale=scale)


def test_a_lora_is_in_the_weights_within_the_block_alone(teacher: Teacher, tmp_path: Path) -> None:
    unet, lora = teacher.components.unet, lora_file(tmp_path, "to_v", "conv1", scale=0.5)
    merge = open_for(teacher.components, lora)
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    with applied(merge, {"unet": unet}):
        inside = {name: value.clone() for name, value in unet.state_dict().items()}
    for name, value in inside.items():
        pairs = merge.pairs.get(f"unet.{name}", ())
        expected = before[name] + sum(pair.difference(value.shape) for pair in pairs)
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-7)
        assert torch.equal(value, before[name]) == (not pairs)
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())


def test_a_lora_of_layers_that_clip_skip_leaves_out_fits(tmp_path: Path) -> None:
    source = TeacherSource(location=str(made.TEACHER), clip_skip=1)
    parts, merge = load_components(source, CPU, torch.float32), None
    merge = open_for(parts, lora_file(tmp_path, "q_proj"))
    own = {f"text_encoder.{name}" for name, _ in parts.text_encoder.named_parameters()}
    assert any("layers.2" in key for key in merge.pairs)
    assert not any("layers.2" in key for key in own)
    before = parts.text_encoder.state_dict()
    with applied(merge, {"text_encoder": parts.text_encoder}):
        changed = [key for key in merge.pairs if "layers.2" not in key]
        now = parts.text_encoder.state_dict()
        assert sum(not torch.equal(now[name], before[name]) for name in now) in (0, len(changed))


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
"""Of the text encoder: diffusers knows kohya's naming of them by the last one."""
NAMINGS: Mapping[str, Callable[[made.Pairs], made.Tensors]] = {
    "kohya": made.kohya,
    "kohya, no alpha": lambda pairs: made.kohya(pairs, alpha=None),
    "peft": made.peft,
    "diffusers": made.diffusers,
}


@pytest.mark.parametrize("naming", NAMINGS)
def test_stock_diffusers_adds_the_same_to_an_export(run_folder: Path, teacher: Teacher, tmp_path: Path, naming) -> None:
    pairs = made.random_pairs("to_q", "to_v", "to_out.0", *PROJECTIONS)
    lora = ScaledLora(file=str(made.write(NAMINGS[naming](pairs), tmp_path / "style.safetensors")), scale=0.7)
    stock = compare(run_folder, teacher, lora, open_for(teacher.components, lora).scaled(1.0))
    assert stock.problem == ""
    assert stock.is_equal, stock


def test_a_sum_that_stock_diffusers_does_not_make_is_not_called_the_same(
    run_folder: Path, teacher: Teacher, tmp_path: Path
) -> None:
    lora = lora_file(tmp_path, "to_q")
    stock = compare(run_folder, teacher, lora, open_for(teacher.components, lora).scaled(1.01))
    assert not stock.is_equal
    assert stock.weights > 1e-4


def test_a_naming_that_stock_diffusers_cannot_read_is_reported_with_its_reason(
    run_folder: Path, teacher: Teacher, tmp_path: Path
) -> None:
    file = made.write(made.peft_without_prefix(made.random_pairs("to_q")), tmp_path / "style.safetensors")
    lora = ScaledLora(file=str(file))
    stock = compare(run_folder, teacher, lora, open_for(teacher.components, lora))
    assert stock.problem
    assert (stock.weights, stock.velocity, stock.is_equal) == (None, None, False)


def compare(run_folder: Path, teacher: Teacher, lora: ScaledLora, merge):
    def predict(pipeline):
        cond = pipeline.encode_prompt(TEXTS[:2], CPU, 1, False)[0]
        noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        return pipeline.unet(noise, torch.tensor([100.0, 900.0]), cond).sample

    return compare_with_stock(run_folder / "export" / "diffusers", lora, merge, predict, CPU)


@pytest.fixture(scope="module")
def v_teacher(teacher: Teacher) -> Teacher:
    """The teacher as a v-predicting one: a student of target vp_v with its very weights is the same field."""
    schedule = replace(teacher.components.schedule, prediction_type="v_prediction")
    return Teacher(replace(teacher.components, schedule=schedule), "hold")


def half_as_strong(student: Student) -> Student:
    """The same field, in which a difference of a `to_v` counts half: 2 W_v, and W_out / 2 behind it."""
    with torch.no_grad():
        for name, parameter in student.unet.named_parameters():
            if name.endswith("to_v.weight"):
                parameter *= 2
            if name.endswith("to_out.0.weight"):
                parameter /= 2
    return student


def measured(
    teacher: Teacher, student: Student, lora: ScaledLora, export: Path, monkeypatch: pytest.MonkeyPatch
) -> LoraMeasurement:
    monkeypatch.setattr("stages.evaluate.lora.compare_with_stock", lambda *words: None)  # another model's export
    (opened,) = open_measured_loras([lora], teacher.components)
    size = teacher.components.native_size
    sampler = Sampler(steps=3, guidance=3.0)
    return measure_lora(opened, LoraInputs(teacher, student, TEXTS, 1, size, sampler, sampler.steps, export))


def vp_student(teacher: Teacher) -> Student:
    bridge = make_vp_bridge("vp_v", teacher.components.schedule, teacher.bridge.tail)
    return Student.from_teacher(teacher.components.unet, bridge).eval().requires_grad_(False)


def test_on_a_student_that_is_its_teacher_a_lora_is_whole_and_needs_no_correction(
    v_teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = lora_file(tmp_path, "to_v", "q_proj", scale=1)
    result = measured(v_teacher, vp_student(v_teacher), lora, tmp_path, monkeypatch)
    assert [strength.scale for strength in result.strengths] == pytest.approx([0.5, 1])
    assert result.components == ("unet", "text_encoder")
    for strength in result.strengths:
        for effect in (strength.conditional.overall, strength.unconditional.overall):
            assert [effect.ratio, effect.slope, effect.cosine] == pytest.approx([1, 1, 1], abs=1e-3)
        assert strength.without.student > 5 * strength.student.student
        assert strength.without.student == pytest.approx(strength.teacher_without.student, rel=0.3)
    assert result.correction is not None
    assert not result.correction.helps
    assert result.correction.searched[1.0] < min(result.correction.searched[0.75], result.correction.searched[1.5])


def test_the_correction_of_a_lora_that_counts_half_is_to_double_it(
    v_teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = lora_file(tmp_path, "to_v", scale=0.8)
    result = measured(v_teacher, half_as_strong(vp_student(v_teacher)), lora, tmp_path, monkeypatch)
    assert result.correction is not None
    assert result.correction.factor == 2
    assert result.correction.helps
    assert result.correction.corrected.student < result.correction.own.student / 5
    assert "use it at 2 times its scale (1.6" in correction_text(result.correction, lora.scale)
    assert result.strengths[0].conditional.overall.slope == pytest.approx(0.5, abs=0.1)


def test_a_lora_of_the_text_encoder_alone_changes_what_both_read(
    v_teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = lora_file(tmp_path, "q_proj", "fc1", scale=2)
    result = measured(v_teacher, vp_student(v_teacher), lora, tmp_path, monkeypatch)
    assert result.components == ("text_encoder",)
    assert result.correction is None
    assert result.strengths[1].conditional.overall.ratio == pytest.approx(1, abs=1e-3)
    assert result.strengths[1].without.student > 5 * result.strengths[1].student.student


def test_a_scale_that_leaves_no_picture_is_refused(
    v_teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = lora_file(tmp_path, "to_v", "conv1", scale=1e25)
    with pytest.raises(Refused, match=r"style.safetensors: at scale .* not finite - choose a smaller scale"):
        measured(v_teacher, vp_student(v_teacher), lora, tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def evaluated(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run after two LoRAs were measured by the command."""
    folder = tmp_path_factory.mktemp("loras")
    prompts = folder / "prompts.txt"
    places, shapes = ("left", "right", "top"), ("star", "ring", "moon", "heart")
    sentences = [f"a {c} {s} at the {p}" for c in ("red", "blue", "green", "pink") for s in shapes for p in places]
    prompts.write_text("\n".join(sentences))
    one, two = lora_file(folder, "to_v", name="one"), lora_file(folder, "q_proj", name="two|`")
    small = ["--lora-prompts", "8", "--paired.steps", "2", "--paired.reference-steps", "4"]
    words = [str(run_folder), "--prompts.source", "file", "--prompts.path", str(prompts), *small]
    assert main([*words, "--lora", f"{one.file}:0.5", f"--lora={two.file}"]) == 0
    return run_folder


def test_the_command_stores_each_lora_whole_without_its_place(evaluated: Path) -> None:
    files = sorted((evaluated / "loras").iterdir())
    assert [file.name for file in files] == ["one.json", "two|`.json"]
    one, two = (json.loads(file.read_text()) for file in files)
    assert (one["name"], one["scale"], one["samples"]) == ("one.safetensors", 0.5, 64)
    assert [strength["scale"] for strength in one["strengths"]] == [0.25, 0.5]
    assert one["stock"]["is_equal"]
    assert two["correction"] is None
    assert not any("/" in line for file in files for line in file.read_text().splitlines())


def test_the_card_has_a_row_for_each_lora_and_scale(evaluated: Path) -> None:
    history = read_history(evaluated, 64)
    assert history is not None
    rows = [line for line in lora_table(history.loras).splitlines() if line.startswith("| `")]
    assert [row.split(" | ")[1] for row in rows] == ["0.25", "0.5", "0.5", "1"]
    assert len({row.replace("\\|", "").count("|") for row in rows}) == 1
    other = read_history(evaluated, 65)
    assert other is not None
    assert other.loras == ()


def test_a_stored_measurement_that_is_none_is_refused_by_the_card(evaluated: Path, tmp_path: Path) -> None:
    for text in ("{", "[]", '{"samples": 64}', '{"samples": 64, "name": "x", "strengths": 3}'):
        (tmp_path / "style.json").write_text(text)
        with pytest.raises(Refused, match=r"style.json: no measurement of a LoRA of ours .* measure again"):
            read_measured_loras(tmp_path, 64)


def test_an_error_without_a_score_is_stored_as_null_and_shown_as_a_dash(evaluated: Path, tmp_path: Path) -> None:
    content = json.loads((evaluated / "loras" / "one.json").read_text())
    content["strengths"][0]["student"] |= {"score": None, "interval": None}
    (tmp_path / "one.json").write_text(json.dumps(content))
    (measurement,) = read_measured_loras(tmp_path, 64)
    assert " | - | - | " in lora_table([measurement])
