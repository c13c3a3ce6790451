"""A student as a whole diffusers folder that the stock `StableDiffusionPipeline` loads and samples correctly."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from stages.export.card import licence_files, licence_of, model_card
from stages.export.folder import copy_added_files, replace_folder, write_facts
from stages.export.history import RunHistory
from stages.export.verify import (
    ExportContent,
    student_digest,
    variant_dtypes,
    verify_folder,
    weight_file,
    with_text_model_prefix,
)
from stages.nets.anatomy import check_sd1_architecture
from stages.nets.files import component_digests, component_files
from stages.nets.loading import load_tokenizer
from stages.nets.student import TIME_SCALE, Student
from stages.system.refusal import Refused


def export_diffusers(
    student: Student,
    teacher_folder: Path,
    out: Path,
    facts: Mapping[str, Any],
    dtype: torch.dtype = torch.float16,
    flow_shift: float = 1.0,
    *,
    half_variant: bool = False,
    history: RunHistory | None = None,
) -> Path:
    """Write `<out>/diffusers`, verify it from the disk, and only then let it replace an earlier export.

    `half_variant` adds fp16 files beside the plain ones; `history` is what the run left to tell. Raises `Refused` when
    a tensor is still the teacher's or does not fit its type, when a law of `checks` is broken, when a folder that is no
    export or was changed stands in the way, and when the disk is full; an earlier export then stays as it was. Files
    that were added to it are kept.
    """
    check_sd1_architecture(teacher_folder)
    content = ExportContent(student, teacher_folder, variant_dtypes(dtype, half_variant), flow_shift)
    told = {**facts, **licence_of(teacher_folder, facts.get("base_model")), **_student_facts(content)}
    with replace_folder(out / "diffusers") as folder:
        for variant, stored in content.dtypes.items():
            _write_variant(folder, content, variant, stored)
        (folder / "README.md").write_text(model_card(told, history), encoding="utf-8")
        _copy_extra_files(folder, teacher_folder, history)
        write_facts(folder, told)
        copy_added_files(out / "diffusers", folder)
        verify_folder(folder, content)
    return out / "diffusers"


def _student_facts(content: ExportContent) -> dict[str, Any]:
    velocity = content.student.vp_bridge is None
    told = {"prediction": "velocity", "path": "linear", "time_scale": TIME_SCALE, "flow_shift": content.flow_shift}
    variants = [variant for variant in content.dtypes if variant]
    return {
        **(told if velocity else {"prediction": "v_prediction", "path": "the teacher's"}),
        "dtype": str(content.dtypes[""]).removeprefix("torch."),
        **({"variants": variants} if variants else {}),
        "teacher_sha256": component_digests(content.teacher_folder),
        "student_sha256": student_digest(content.student),
    }


def _write_variant(folder: Path, content: ExportContent, variant: str, dtype: torch.dtype) -> None:
    """Every part in one type; what is not weights comes out the same for each variant."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(
            UNet2DConditionModel.load_config(content.teacher_folder, subfolder="unet")
        )
    weights = content.unet_tensors(dtype)
    if unet.state_dict().keys() != weights.keys():
        raise Refused(
            f"export: the student's tensors are not those of {content.teacher_folder}/unet - name its own teacher"
        )
    unet.load_state_dict(weights, assign=True)
    tokenizer = load_tokenizer(content.teacher_folder)
    StableDiffusionPipeline(
        unet=unet,
        vae=content.load_vae(dtype),
        text_encoder=content.load_text_encoder(dtype),
        tokenizer=tokenizer,
        scheduler=content.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder, variant=variant or None)
    _prefix_text_encoder_keys(folder / weight_file("text_encoder", variant))
    _keep_tokenizer(tokenizer, component_files(content.teacher_folder, "tokenizer"), folder / "tokenizer")
    _load_in_float32(folder / "text_encoder" / "config.json")
    for config in (folder / "model_index.json", *folder.glob("*/config.json"), *folder.glob("*/tokenizer_config.json")):
        _remove_local_path(config)


def _copy_extra_files(folder: Path, teacher_folder: Path, history: RunHistory | None) -> None:
    """The pictures that the card shows, and the licence that goes where the weights go."""
    for file in licence_files(teacher_folder):
        shutil.copyfile(file, folder / file.name)
    for name, picture in (history.pictures if history else {}).items():
        shutil.copyfile(picture, folder / name)


def _load_in_float32(config: Path) -> None:
    """Name float32 as the type to load in when nobody asks for one.

    transformers 5 else takes the type of the file, diffusers always float32, and a pipeline of both does not run.
    """
    content = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps({**content, "dtype": "float32"}, indent=2) + "\n", encoding="utf-8")


def _prefix_text_encoder_keys(file: Path) -> None:
    save_file(with_text_model_prefix(load_file(file)), file, metadata={"format": "pt"})


def _keep_tokenizer(tokenizer: CLIPTokenizer, files: Sequence[Path], folder: Path) -> None:
    """The teacher's own tokenizer files over what this transformers wrote; vocab.json and merges.txt in any case."""
    for file in files:
        shutil.copyfile(file, folder / file.name)
    if not ((folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()):
        tokenizer.backend_tokenizer.model.save(str(folder))


def _remove_local_path(config: Path) -> None:
    """Take out where on this machine a part was loaded from."""
    content = json.loads(config.read_text(encoding="utf-8"))
    kept = {key: value for key, value in content.items() if key not in ("_name_or_path", "name_or_path")}
    if kept != content:
        config.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
