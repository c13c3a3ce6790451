"""A student as a whole diffusers folder that the stock `StableDiffusionPipeline` loads and samples correctly."""

import json
import shutil
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTokenizer

from stages.export.card import licence_files, licence_of, model_card
from stages.export.folder import copy_added_files, replace_folder, write_facts
from stages.export.history import RunHistory
from stages.export.verify_export import (
    DEFAULT_OPTIONS,
    SKIPPED_LAYERS_FILE,
    ExportContent,
    ExportOptions,
    student_digest,
    verify_folder,
    weight_file,
    with_text_model_prefix,
)
from stages.nets.loading import load_tokenizer
from stages.nets.student import TIME_SCALE, Student
from stages.nets.student_shape import shape_settings
from stages.system.refusal import Refused
from stages.teacher_files.architecture import check_sd1_architecture
from stages.teacher_files.folder import component_digests, component_files

LOCAL_PATH_KEYS = ("_name_or_path", "name_or_path")
"""Keys of configs with the folder of this machine that a component was loaded from."""


def export_diffusers(
    student: Student,
    teacher_folder: Path,
    out: Path,
    facts: Mapping[str, Any],
    options: ExportOptions = DEFAULT_OPTIONS,
    history: RunHistory | None = None,
) -> Path:
    """Write `<out>/diffusers`, verify it from the disk, and only then let it replace an earlier export.

    Raises `Refused` when a tensor is still the teacher's or does not fit its type, when a check of `checks` fails, when
    a folder that is no export or was changed has that name, and when the disk is full; an earlier export then stays as
    it was. Files that were added to it are kept.
    """
    check_sd1_architecture(teacher_folder)
    content = ExportContent(student, teacher_folder, options)
    identity = {"teacher_sha256": component_digests(teacher_folder)} if "teacher_sha256" not in facts else {}
    licence = licence_of(teacher_folder, facts.get("base_model"))
    facts = {**facts, **licence, **identity, **_student_facts(content)}
    with replace_folder(out / "diffusers") as folder:
        for variant, dtype in content.dtypes.items():
            _write_variant(folder, content, variant, dtype)
        if skipped := content.skipped_tensors(content.dtypes[""]):
            save_file(skipped, folder / SKIPPED_LAYERS_FILE, metadata={"format": "pt"})
        (folder / "README.md").write_text(model_card(facts, history), encoding="utf-8")
        for file in licence_files(teacher_folder):
            shutil.copyfile(file, folder / file.name)
        for name, picture in (history.pictures if history else {}).items():
            shutil.copyfile(picture, folder / name)
        write_facts(folder, facts)
        copy_added_files(out / "diffusers", folder)
        verify_folder(folder, content)
    return out / "diffusers"


def _student_facts(content: ExportContent) -> dict[str, Any]:
    facts: dict[str, Any] = {"prediction": "v_prediction", "path": "the teacher's"}
    if content.student.vp_bridge is None:
        facts = {"prediction": "velocity", "path": "linear", "time_scale": TIME_SCALE}
        facts["flow_shift"] = content.options.flow_shift
    variants = [variant for variant in content.dtypes if variant]
    return {
        **facts,
        "dtype": str(content.dtypes[""]).removeprefix("torch."),
        **({"variants": variants} if variants else {}),
        **({"clip_skip": content.clip_skip} if content.clip_skip else {}),
        "student_sha256": student_digest(content.student),
    }


def _write_variant(folder: Path, content: ExportContent, variant: str, dtype: torch.dtype) -> None:
    """Every component in one type; files other than weights are the same for each variant."""
    teacher = content.teacher_folder
    with torch.device("meta"):
        config = UNet2DConditionModel.load_config(teacher, subfolder="unet") | shape_settings(
            content.student.unet.config
        )
        guidance_input = {"time_cond_proj_dim": content.student.unet.config.time_cond_proj_dim}
        unet = UNet2DConditionModel.from_config(
            {**config, **(guidance_input if content.student.embeds_guidance else {})}
        )
    weights = content.unet_tensors(dtype)
    if unet.state_dict().keys() != weights.keys():
        raise Refused(f"export: the student's tensors are not those of {teacher}/unet - name its own teacher")
    unet.load_state_dict(weights, assign=True)
    tokenizer = load_tokenizer(teacher)
    StableDiffusionPipeline(
        unet=unet,
        **_copies(content.teacher_components, dtype),
        tokenizer=tokenizer,
        scheduler=content.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder, variant=variant or None)
    text_encoder = folder / weight_file("text_encoder", variant)
    save_file(with_text_model_prefix(load_file(text_encoder)), text_encoder, metadata={"format": "pt"})
    _keep_tokenizer(tokenizer, component_files(teacher, "tokenizer"), folder / "tokenizer")
    # By default transformers 5 takes the file's type, diffusers always float32, and a pipeline of both does not run.
    _rewrite_config(folder / "text_encoder" / "config.json", dtype="float32")
    for config in (folder / "model_index.json", *folder.glob("*/config.json"), *folder.glob("*/tokenizer_config.json")):
        _rewrite_config(config)


def _copies(components: Mapping[str, nn.Module], dtype: torch.dtype) -> dict[str, nn.Module]:
    # torch's own `to`: that of diffusers warns of layers to be kept in fp32, of which there are none.
    return {name: nn.Module.to(deepcopy(module), dtype) for name, module in components.items()}


def _keep_tokenizer(tokenizer: CLIPTokenizer, files: Sequence[Path], folder: Path) -> None:
    """The teacher's own tokenizer files over what this transformers wrote; vocab.json and merges.txt in any case."""
    for file in files:
        shutil.copyfile(file, folder / file.name)
    if not ((folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()):
        tokenizer.backend_tokenizer.model.save(str(folder))


def _rewrite_config(config: Path, **settings: str) -> None:
    """Set these settings, and remove the path on this machine that the component was loaded from."""
    content = json.loads(config.read_text(encoding="utf-8"))
    kept = {key: value for key, value in content.items() if key not in LOCAL_PATH_KEYS} | settings
    if kept != content:
        config.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
