"""A mix of fine-tunes is base + sum of weight * (fine-tune - base), whatever its files are and in which order."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from stages.nets.components import load_components
from stages.system.refusal import Refused
from stages.teacher_files.mix.weights import FAR_DISTANCE
from stages.teacher_files.open import TeacherFolder, open_teacher_files
from stages.teacher_files.recorded import changed_parts, find_teacher, recorded_sources
from stages.teacher_files.source import LoraFile, TeacherMove, TeacherSource
from stages.teacher_files.variants import WEIGHT_FILES
from tests import lora_files as made
from tests.fine_tunes import MIXED, Tensors, change, fine_tune, setting, single
from tests.single_files import MODEL, part_weights, saved

TOLERANCE = 1e-6
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two fine-tunes, A and B."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("AB"):
        fine_tune(folder / name, seed)
    return folder


def mixed(*entries: tuple[Path, float], location: Path = MODEL, **options: Any) -> TeacherFolder:
    mix = [{"model": str(model), "weight": weight} for model, weight in entries]
    return open_teacher_files(TeacherSource.model_validate({"location": str(location), "mix": mix, **options}))


def written(teacher: TeacherFolder, part: str) -> Tensors:
    return load_file(teacher.folder / part / WEIGHT_FILES[part][0])


def values(part: str, folder: Path) -> dict[str, np.ndarray]:
    return {name: value.double().numpy() for name, value in part_weights(part, folder).items()}


def assert_sum(teacher: TeacherFolder, *entries: tuple[Path, float], base: Path = MODEL) -> None:
    """The composed weights are the plain arithmetic on whole models."""
    for part in MIXED:
        own, result = values(part, base), written(teacher, part)
        others = [(values(part, model), weight) for model, weight in entries]
        assert result.keys() == own.keys()
        for name, value in own.items():
            expected = value + sum(weight * (held[name] - value) for held, weight in others)
            assert result[name].dtype == torch.float32
            assert abs(result[name].numpy() - expected).max() <= TOLERANCE, name


@pytest.mark.parametrize("weights", [(0.6, 0.4), (1.5, -0.25), (0.2, 0.3)])
def test_a_mix_is_the_plain_arithmetic_on_whole_models(models: Path, weights: tuple[float, float]) -> None:
    entries = list(zip((models / "A", models / "B"), weights, strict=True))
    teacher = mixed(*entries)
    assert_sum(teacher, *entries)
    assert (teacher.folder / "vae" / WEIGHT_FILES["vae"][0]).samefile(MODEL / "vae" / WEIGHT_FILES["vae"][0])


def test_loaded_it_computes_with_these_sums(models: Path) -> None:
    parts = load_components(mixed((models / "A", 0.6), (models / "B", 0.4)), CPU, torch.float32)
    base, a, b = (load_components(str(place), CPU, torch.float32).unet for place in (MODEL, models / "A", models / "B"))
    theirs = [one.state_dict() for one in (a, b)]
    base.load_state_dict({name: 0.6 * theirs[0][name] + 0.4 * theirs[1][name] for name in base.state_dict()})
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    cond = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        one, other = (unet(noise, torch.tensor(500), cond).sample for unet in (parts.unet, base))
    assert float((one - other).abs().max()) <= 1e-4


def test_one_of_weight_1_is_the_model_itself_bit_by_bit(models: Path) -> None:
    teacher = mixed((models / "A", 1))
    for part in MIXED:
        own, result = part_weights(part, models / "A"), written(teacher, part)
        assert all(torch.equal(result[name], value) for name, value in own.items())


@pytest.mark.parametrize("form", ["a single file", "a checkpoint", "files of half precision", "a folder of one file"])
def test_a_model_may_lie_in_any_form(form: str, models: Path, tmp_path: Path) -> None:
    model = {
        "a single file": lambda: single(models / "B", tmp_path / "b.safetensors"),
        "a checkpoint": lambda: single(models / "B", tmp_path / "b.ckpt"),
        "files of half precision": lambda: Path(shutil.copytree(models / "B", tmp_path / "half")),
        "a folder of one file": lambda: single(models / "B", (tmp_path / "f").mkdir() or tmp_path / "f/b.safetensors"),
    }[form]()
    if form == "files of half precision":
        for part in MIXED:
            change(model, part, lambda held: {name: value.half() for name, value in held.items()})
        assert_sum(mixed((models / "A", 0.6), (model, 0.4)), (models / "A", 0.6), (model, 0.4))
        return
    place = model.parent if form == "a folder of one file" else model
    assert_sum(mixed((models / "A", 0.6), (place, 0.4)), (models / "A", 0.6), (models / "B", 0.4))


def test_the_base_may_be_a_single_file_too(models: Path, tmp_path: Path) -> None:
    base = single(models / "B", tmp_path / "base.safetensors")
    alone = single(models / "A", tmp_path / "a.safetensors")
    teacher = mixed((alone, 0.5), location=base, config=str(MODEL))
    assert_sum(teacher, (models / "A", 0.5), base=models / "B")


def test_a_unet_alone_leaves_the_bases_text_encoder(models: Path, tmp_path: Path) -> None:
    plain = open_teacher_files(TeacherSource(location=str(MODEL))).digests
    for file in (
        single(models / "A", tmp_path / "ldm.safetensors", "unet"),
        saved(tmp_path / "own.safetensors", part_weights("unet", models / "A")),
    ):
        teacher = mixed((file, 0.5))
        assert any("UNet alone" in note for note in teacher.notes)
        assert teacher.digests["text_encoder"] == plain["text_encoder"]
        assert teacher.digests["unet"] != plain["unet"]


def test_the_names_of_a_text_encoder_may_lack_their_prefix(models: Path, tmp_path: Path) -> None:
    flat = Path(shutil.copytree(models / "A", tmp_path / "flat"))
    change(flat, "text_encoder", lambda held: {name.removeprefix("text_model."): v for name, v in held.items()})
    teacher = mixed((flat, 1))
    own, result = part_weights("text_encoder", models / "A"), written(teacher, "text_encoder")
    assert all(torch.equal(result[name], value) for name, value in own.items())


def test_the_order_changes_nothing_and_weights_and_contents_do(models: Path, tmp_path: Path) -> None:
    pair = mixed((models / "A", 0.6), (models / "B", 0.4))
    turned = mixed((models / "B", 0.4), (models / "A", 0.6))
    assert (turned.digests, turned.folder) == (pair.digests, pair.folder)
    moved = Path(shutil.copytree(models / "A", tmp_path / "renamed"))
    assert mixed((moved, 0.6), (models / "B", 0.4)).digests == pair.digests
    others = [mixed((models / "A", 0.4), (models / "B", 0.6)), mixed((models / "A", 0.6))]
    assert all(other.digests["unet"] != pair.digests["unet"] for other in others)


def test_loras_and_clip_skip_come_after_the_mix(models: Path, tmp_path: Path) -> None:
    file = made.write(made.kohya(made.random_pairs("to_q", "fc1")), tmp_path / "style.safetensors")
    loras = (LoraFile(file=str(file), scale=0.5),)
    at_once = mixed((models / "A", 0.6), loras=loras, clip_skip=1)
    first = mixed((models / "A", 0.6)).folder
    then = open_teacher_files(TeacherSource(location=str(first), loras=loras, clip_skip=1))
    for part in MIXED:
        one, other = written(at_once, part), written(then, part)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    beside = "text_encoder/skipped_layers.safetensors"
    one, other = (load_file(teacher.folder / beside) for teacher in (at_once, then))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_every_file_is_named_with_the_number_of_its_model(models: Path, tmp_path: Path) -> None:
    file = single(models / "B", tmp_path / "b.safetensors")
    roles = {(one.role, one.path.name) for one in mixed((models / "A", 0.6), (file, 0.4)).sources}
    weights = {part: WEIGHT_FILES[part][0] for part in WEIGHT_FILES}
    expected = {("mix 2", "b.safetensors"), *weights.items(), *((f"mix 1 {part}", weights[part]) for part in MIXED)}
    assert roles == expected


def test_exports_state_names_weights_and_hashes_and_no_places(models: Path, tmp_path: Path) -> None:
    file = single(models / "B", tmp_path / "b.safetensors")
    facts = load_components(mixed((models / "A", 0.6), (file, 0.4)), CPU, torch.float32).change_facts
    one, other = facts["mix"]
    assert (one["name"], one["weight"], sorted(one["sha256"])) == ("A", 0.6, sorted(MIXED))
    assert (other["name"], other["weight"], len(other["sha256"])) == ("b.safetensors", 0.4, 64)
    assert str(tmp_path) not in str(facts)
    assert str(models) not in str(facts)


def test_a_recorded_mix_is_opened_where_its_models_lie_now(models: Path, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "here").mkdir()
    single(models / "A", tmp_path / "here/a.safetensors")
    monkeypatch.chdir(tmp_path / "here")
    source = TeacherSource.model_validate(
        {"location": str(MODEL), "mix": [{"model": "a.safetensors", "weight": 0.5}, {"model": "own/er", "weight": 1}]}
    ).absolute()
    assert [one.model for one in source.mix] == [str(tmp_path / "here/a.safetensors"), "own/er"]
    recorded = source.model_copy(update={"mix": source.mix[:1]})
    digests = open_teacher_files(recorded).digests
    monkeypatch.chdir(tmp_path)
    (stored,) = recorded_sources(str(MODEL), None, recorded.model_dump(mode="json"))
    assert not changed_parts(digests, find_teacher([stored]))
    (tmp_path / "here/a.safetensors").rename(tmp_path / "moved.safetensors")
    with pytest.raises(Refused, match="there is no such file"):
        find_teacher([stored])
    for weight, changed in ((0.5, []), (0.4, ["unet", "text_encoder"])):
        move = TeacherMove.model_validate({"mix": [{"model": "moved.safetensors", "weight": weight}]})
        assert changed_parts(digests, find_teacher([move.over(stored)])) == changed


def test_what_was_recorded_before_mixes_existed_is_read() -> None:
    (source,) = recorded_sources("x", None, {"location": "x", "loras": [], "clip_skip": 0})
    assert source.mix == ()


def test_a_note_says_how_far_a_model_is_and_warns_of_one_that_is_no_fine_tune(models: Path, tmp_path: Path) -> None:
    (note,) = (note for note in mixed((models / "A", 0.5)).notes if note.startswith("mix"))
    assert "distance 0.05" in note
    assert "far" not in note
    generator = torch.Generator().manual_seed(9)
    foreign = Path(shutil.copytree(MODEL, tmp_path / "foreign"))
    change(
        foreign,
        "unet",
        lambda held: {n: v.std(correction=0) * torch.randn(v.shape, generator=generator) for n, v in held.items()},
    )
    (note,) = (note for note in mixed((foreign, 0.5)).notes if note.startswith("mix"))
    assert float(note.split("distance ")[1].split(" ")[0]) > FAR_DISTANCE
    assert "far" in note


def test_the_base_itself_adds_nothing_and_a_note_says_so(models: Path) -> None:
    both = mixed((models / "A", 0.5), (MODEL, 0.5))
    assert any("adds nothing" in note for note in both.notes)
    assert both.digests == mixed((models / "A", 0.5)).digests


def test_a_v_predicting_base_takes_v_predicting_fine_tunes(models: Path, tmp_path: Path) -> None:
    base, own = (Path(shutil.copytree(place, tmp_path / place.name)) for place in (MODEL, models / "A"))
    for folder in (base, own):
        setting(folder, "scheduler/scheduler_config.json", prediction_type="v_prediction")
    assert_sum(mixed((own, 0.5), location=base), (models / "A", 0.5))
    with pytest.raises(Refused, match=r"prediction_type epsilon, the base has v_prediction"):
        mixed((models / "A", 0.5), location=base)
