"""A single file becomes the folder that it was made from, tensor by tensor, and is known again by its content."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from stages.sampling.models import load_model
from stages.system.refusal import Refused
from stages.teacher_files.compose import COMPOSED_FILE, teachers_home
from stages.teacher_files.folder import component_digests
from stages.teacher_files.open import TeacherFolder, open_teacher_files
from stages.teacher_files.recorded import changed_parts
from stages.teacher_files.source import TeacherMove, TeacherSource
from stages.teacher_files.variants import WEIGHT_FILES
from tests.single_files import MODEL, TEXT, UNET, VAE, averaged, ldm_tensors, part_weights, saved

LDM = ldm_tensors()


def opened(location: Path, **options: Any) -> TeacherFolder:
    options = {"config": str(MODEL), **options}
    return open_teacher_files(TeacherSource(location=str(location), **options))


def assert_weights(folder: Path, factor: float = 1.0, parts: tuple[str, ...] = tuple(WEIGHT_FILES)) -> None:
    """The folder holds the embedded teacher's tensors; those of the UNet times a factor."""
    for part in parts:
        made, expected = part_weights(part, folder), part_weights(part)
        assert made.keys() == expected.keys()
        scale = factor if part == "unet" else 1.0
        assert all(torch.equal(made[name], scale * value) for name, value in expected.items()), part


def pickle_of(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {"state_dict": tensors, "epoch": 3, "callbacks": {"x": torch.nn.ReLU()}}


WHOLE: dict[str, dict[str, Tensor]] = {
    "plain": LDM,
    "with a trainer's prefixes": {f"module._orig_mod.{name}": value for name, value in LDM.items()},
    "with averaged weights beside": {**LDM, **averaged(LDM)},
    "with counts of positions": {**LDM, f"{TEXT}text_model.embeddings.position_ids": torch.arange(24)[None]},
    "with positions as numbers": {**LDM, f"{TEXT}text_model.embeddings.position_ids": torch.arange(24.0)[None]},
    "with a text encoder of flat names": {name.replace("text_model.", ""): value for name, value in LDM.items()},
    "with the autoencoder's loss": {**LDM, f"{VAE}loss.logvar": torch.zeros(1)},
    "with an autoencoder of matrices": {
        name: value.flatten(1) if ".attn_1." in name and value.ndim == 4 else value for name, value in LDM.items()
    },
    "of components by diffusers' names": {
        f"{part}.{name}": value for part in WEIGHT_FILES for name, value in part_weights(part).items()
    },
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_model_of_any_spelling_becomes_its_folder(name: str, tmp_path: Path) -> None:
    teacher = opened(saved(tmp_path / "x.safetensors", WHOLE[name]))
    assert_weights(teacher.folder)
    assert (teacher.folder / "scheduler/scheduler_config.json").read_text() == (
        MODEL / "scheduler/scheduler_config.json"
    ).read_text()
    assert not (teacher.folder / "README.md").exists()  # the card of the configs is not the file's


@pytest.mark.parametrize("ending", ["ckpt", "pt", "bin"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_becomes_its_folder_and_says_what_was_not_read(ending: str, zipped: bool, tmp_path: Path) -> None:
    torch.save(pickle_of(LDM), tmp_path / f"x.{ending}", _use_new_zipfile_serialization=zipped)
    teacher = opened(tmp_path / f"x.{ending}")
    assert_weights(teacher.folder)
    assert any("ReLU" in note and "no code was run" in note for note in teacher.notes)


UNETS = {
    "in LDM's names": ldm_tensors(parts=("unet",)),
    "in LDM's names without prefix": {n.removeprefix(UNET): v for n, v in ldm_tensors(parts=("unet",)).items()},
    "in diffusers' names": part_weights("unet"),
}


@pytest.mark.parametrize("name", UNETS)
@pytest.mark.parametrize("rest", ["folder", "file"])
def test_a_unet_alone_takes_the_other_parts_from_elsewhere(name: str, rest: str, tmp_path: Path) -> None:
    file = saved(tmp_path / "unet.safetensors", UNETS[name])
    others = MODEL if rest == "folder" else saved(tmp_path / "rest.safetensors", LDM)
    options = {"config": None if rest == "folder" else str(MODEL)}
    assert_weights(opened(file, parts_from=str(others), **options).folder)


OLD = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


def with_old_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for new, old in OLD.items():
        tensors = {name.replace(new, old): value for name, value in tensors.items()}
    return tensors


@pytest.mark.parametrize(
    "tensors",
    [
        ldm_tensors(parts=("vae",)),
        {name.removeprefix(VAE): value for name, value in ldm_tensors(parts=("vae",)).items()},
        part_weights("vae"),
        with_old_names(part_weights("vae")),
    ],
    ids=["LDM", "LDM without prefix", "diffusers", "old diffusers"],
)
def test_another_autoencoder_is_composed_in(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    file = saved(tmp_path / "vae.safetensors", {name: 2 * value for name, value in tensors.items()})
    teacher = open_teacher_files(TeacherSource(location=str(MODEL), vae=str(file)))
    made = part_weights("vae", teacher.folder)
    assert all(torch.equal(made[name], 2 * value) for name, value in part_weights("vae").items())
    assert_weights(teacher.folder, parts=("unet", "text_encoder"))
    own = component_digests(MODEL)
    assert {part for part, digest in teacher.digests.items() if digest != own[part]} == {"vae"}
    assert (teacher.folder / "README.md").resolve() == MODEL / "README.md"


def test_an_autoencoder_of_a_folder_is_composed_in_with_its_own_identity(tmp_path: Path) -> None:
    bare = Path(shutil.copytree(MODEL / "vae", tmp_path / "vae"))
    whole = Path(shutil.copytree(MODEL, tmp_path / "whole"))
    for folder in (bare, whole / "vae"):
        saved(folder / WEIGHT_FILES["vae"][0], {name: 2 * value for name, value in part_weights("vae").items()})
    first, second = (open_teacher_files(TeacherSource(location=str(MODEL), vae=str(it))) for it in (bare, whole))
    assert first.digests == second.digests
    assert first.folder == second.folder
    assert first.digests["vae"] == component_digests(whole)["vae"]


def test_averaged_weights_are_taken_on_request_and_where_there_are_no_others(tmp_path: Path) -> None:
    both = saved(tmp_path / "both.safetensors", {**LDM, **averaged(LDM)})
    plain = opened(both)
    assert_weights(plain.folder)
    assert any("--teacher.averaged true" in note for note in plain.notes)
    asked = opened(both, averaged=True)
    assert_weights(asked.folder, factor=1.5)
    assert changed_parts(plain.digests, asked) == ["unet"]
    rest = {name: value for name, value in LDM.items() if not name.startswith(UNET)}
    alone = opened(saved(tmp_path / "alone.safetensors", {**rest, **averaged(LDM)}))
    assert_weights(alone.folder, factor=1.5)
    assert any("alone" in note for note in alone.notes)


def schedule(rescaled: bool) -> dict[str, Tensor]:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    root = (1 - betas).cumprod(0).sqrt()
    if rescaled:
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return {"betas": betas.float(), "alphas_cumprod": (root**2).float()}


@pytest.mark.parametrize("kind", [torch.float32, torch.float16])
def test_the_tables_of_a_schedule_say_whether_it_ends_without_signal(kind: torch.dtype, tmp_path: Path) -> None:
    for rescaled in (False, True):
        tables = {name: value.to(kind) for name, value in schedule(rescaled).items()}
        teacher = opened(saved(tmp_path / "x.safetensors", {**LDM, **tables}))
        config = json.loads((teacher.folder / "scheduler/scheduler_config.json").read_text())
        assert config["rescale_betas_zero_snr"] is rescaled
        assert config["prediction_type"] == ("v_prediction" if rescaled else "epsilon")
        assert teacher.stated == ({"zero_terminal_snr": True} if rescaled else {})
    other = {"alphas_cumprod": torch.linspace(0.99, 0.01, 1000)}
    with pytest.raises(Refused, match=r"its schedule .* is not that of .*--teacher\.config"):
        opened(saved(tmp_path / "y.safetensors", {**LDM, **other}))


def test_markers_and_metadata_state_the_prediction(tmp_path: Path) -> None:
    marked = opened(saved(tmp_path / "a.safetensors", {**LDM, "v_pred": torch.empty(0), "ztsnr": torch.empty(0)}))
    assert marked.stated == {"prediction_type": "v_prediction", "zero_terminal_snr": True}
    described = opened(saved(tmp_path / "b.safetensors", LDM, {"modelspec.prediction_type": "v"}))
    assert described.stated == {"prediction_type": "v_prediction"}
    config = json.loads((described.folder / "scheduler/scheduler_config.json").read_text())
    assert config["prediction_type"] == "v_prediction"
    overridden = opened(tmp_path / "b.safetensors", prediction="epsilon")
    assert changed_parts(described.digests, overridden) == ["scheduler"]


def test_a_file_is_known_again_by_its_content_alone(tmp_path: Path) -> None:
    first = opened(saved(tmp_path / "a.safetensors", LDM))
    (tmp_path / "elsewhere").mkdir()
    second = opened((tmp_path / "a.safetensors").rename(tmp_path / "elsewhere" / "other name.safetensors"))
    assert first.digests == second.digests
    assert first.folder == second.folder
    saved(tmp_path / "elsewhere" / "other name.safetensors", {**LDM, f"{UNET}out.2.bias": torch.ones(4)})
    third = opened(tmp_path / "elsewhere" / "other name.safetensors")
    assert changed_parts(first.digests, third) == ["unet", "vae", "text_encoder"]
    assert [source.path for source in third.sources] == [tmp_path / "elsewhere" / "other name.safetensors"]


@pytest.mark.parametrize("damage", ["cut", "changed", "lost", "no record"])
def test_a_damaged_composed_folder_is_made_anew(damage: str, tmp_path: Path) -> None:
    file = saved(tmp_path / "a.safetensors", {**LDM, f"{VAE}quant_conv.bias": torch.ones(8) * len(damage)})
    folder = opened(file).folder
    weights = folder / "vae" / WEIGHT_FILES["vae"][0]
    content = weights.read_bytes()
    match damage:
        case "cut":
            weights.write_bytes(content[:-10])
        case "changed":
            weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        case "lost":
            weights.unlink()
        case "no record":
            (folder / COMPOSED_FILE).unlink()
    assert opened(file).folder == folder
    assert weights.read_bytes() == content
    assert not list(teachers_home().glob(".*"))


def test_a_whole_composed_folder_is_not_written_again(tmp_path: Path) -> None:
    file = saved(tmp_path / "a.safetensors", LDM)
    folder = opened(file).folder
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    shutil.copy(file, tmp_path / "b.safetensors")
    assert opened(tmp_path / "b.safetensors").folder == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_half_precision_stays_half(tmp_path: Path) -> None:
    half = opened(saved(tmp_path / "h.safetensors", {name: value.bfloat16() for name, value in LDM.items()}))
    assert {value.dtype for value in part_weights("unet", half.folder).values()} == {torch.bfloat16}


def test_a_move_changes_what_is_given_and_keeps_the_rest() -> None:
    recorded = TeacherSource(location="a", vae="v", clip_skip=1)
    assert TeacherMove.model_validate("b").over(recorded) == TeacherSource(location="b", vae="v", clip_skip=1)
    assert TeacherMove(vae="w").over(recorded) == TeacherSource(location="a", vae="w", clip_skip=1)


def test_skipped_layers_lie_beside_the_text_encoder_that_is_read(tmp_path: Path) -> None:
    folder = open_teacher_files(TeacherSource(location=str(MODEL), clip_skip=2)).folder
    skipped = load_file(folder / "text_encoder/skipped_layers.safetensors")
    assert {**part_weights("text_encoder", folder), **skipped}.keys() == part_weights("text_encoder").keys()
    assert json.loads((folder / "text_encoder/config.json").read_text())["num_hidden_layers"] == 1


def test_a_teacher_of_a_pickle_is_sampled_like_its_folder(tmp_path: Path) -> None:
    torch.save(pickle_of(LDM), tmp_path / "x.ckpt")
    file, folder = load_model(str(tmp_path / "x.ckpt"), "cpu", None, str(MODEL)), load_model(str(MODEL), "cpu")
    cond, latents = folder.encode(["a red star"]), torch.randn(1, *folder.latents.latent_shape())
    assert torch.equal(file.encode(["a red star"]), cond)
    assert torch.equal(file.decode(latents), folder.decode(latents))
    with pytest.raises(Refused, match="with --config-from FOLDER"):
        load_model(str(tmp_path / "x.ckpt"), "cpu")


def test_counters_that_averaged_weights_left_behind_are_no_averaged_weights(tmp_path: Path) -> None:
    counters = {name: value for name, value in averaged(LDM).items() if value.ndim == 0}
    assert len(counters) == 2
    teacher = opened(saved(tmp_path / "pruned.safetensors", {**LDM, **counters}))
    assert not any("averaged" in note for note in teacher.notes)
    with pytest.raises(Refused, match="holds no averaged weights"):
        opened(tmp_path / "pruned.safetensors", averaged=True)
