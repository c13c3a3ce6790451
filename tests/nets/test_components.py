"""What a teacher's folder must be, and how it is refused."""

import json
from pathlib import Path

import pytest

from stages.nets.components import load_components
from stages.system.refusal import Refused
from stages.teacher_files.architecture import check_sd1_architecture
from stages.teacher_files.hub import resolve_folder
from stages.tiny.anatomy import build_unet

INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
}


def folder_of(root: Path, index: dict[str, object], **unet: object) -> Path:
    """A model folder that has configs and no weights."""
    (root / "unet").mkdir()
    (root / "model_index.json").write_text(json.dumps(index))
    (root / "unet" / "config.json").write_text(json.dumps({**dict(build_unet().config), **unet}, default=str))
    return root


def test_a_folder_with_the_nine_blocks_is_accepted(tmp_path: Path) -> None:
    check_sd1_architecture(folder_of(tmp_path, INDEX))


def test_a_teacher_that_is_nowhere_is_refused_by_name() -> None:
    with pytest.raises(Refused, match="'no/such-model' is neither a folder nor a hub repository"):
        resolve_folder("no/such-model")
    with pytest.raises(Refused, match="'/no/such/folder' is neither"):
        resolve_folder("/no/such/folder")


def test_a_folder_that_is_no_model_is_refused_with_the_missing_file(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"model_index\.json is missing"):
        check_sd1_architecture(tmp_path)


def test_other_parts_are_refused_by_name(tmp_path: Path) -> None:
    other = {**INDEX, "text_encoder": ["transformers", "T5EncoderModel"]}
    with pytest.raises(Refused, match="text_encoder is T5EncoderModel, not CLIPTextModel"):
        check_sd1_architecture(folder_of(tmp_path, other))


def test_another_architecture_is_refused_with_the_key_and_both_values(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"in_channels is 9, an SD-1\.x model has 4"):
        check_sd1_architecture(folder_of(tmp_path, INDEX, in_channels=9))


@pytest.mark.parametrize("prediction_type", ["sample", "flow_prediction"])
def test_another_prediction_type_is_refused_before_weights_are_read(tmp_path: Path, prediction_type: str) -> None:
    folder = folder_of(tmp_path, INDEX)
    (folder / "scheduler").mkdir()
    config = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
    (folder / "scheduler" / "scheduler_config.json").write_text(
        json.dumps(config | {"prediction_type": prediction_type})
    )
    with pytest.raises(Refused, match=f"{prediction_type}.*epsilon or v_prediction"):
        load_components(str(folder), "cpu", None)  # type: ignore[arg-type]
