"""Models to sample: a run, an exported folder or file, or a teacher, recognised by the files at a location."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from stages.flow.bridge import TailPolicy
from stages.nets.components import Components, load_components
from stages.nets.latents import LatentGeometry
from stages.nets.run_folder import is_run, load_run_teacher, load_student, open_run
from stages.nets.scheduler import vp_scheduler
from stages.nets.student import Student, make_vp_bridge
from stages.nets.teacher import Teacher
from stages.sampling.few_steps import FewSteps, check_few_steps, few_steps_of, few_steps_of_run
from stages.sampling.fields import TwoBranchField, student_field, teacher_field
from stages.sampling.single_file import load_pipeline, load_single_file, read_single_file, scheduler_shift
from stages.system.device import device_of
from stages.system.refusal import Refused
from stages.teacher_files.architecture import check_sd1_architecture
from stages.teacher_files.base import locate
from stages.teacher_files.folder import MODEL_INDEX, read_json
from stages.teacher_files.hub import SINGLE_FILE_SUFFIXES, resolve_configs
from stages.teacher_files.open import open_teacher_files
from stages.teacher_files.parts import open_tensor_source
from stages.teacher_files.source import TeacherSource

FACTS_FILE = "sollune.json"


@dataclass(frozen=True)
class LoadedModel:
    """Everything between sentences and pictures in [0, 1]."""

    field: TwoBranchField
    encode: Callable[[Sequence[str]], Tensor]
    decode: Callable[[Tensor], Tensor]
    latents: LatentGeometry
    """The latents of each picture size, and which sizes are valid."""
    metadata: Mapping[str, Any]
    """What identifies the weights, for the pictures' metadata."""
    shift: float = 1.0
    tokenizer: Any = None
    """None where it is not known."""


def load_model(
    location: str, device: str, checkpoint: int | None = None, config_from: str | None = None
) -> LoadedModel:
    """The model at `location`; of a folder without metadata, the scheduler tells a teacher from an exported student.

    Raises `Refused` for a location that holds no model, and for `checkpoint` and `config_from` where they mean nothing.
    """
    where, place = device_of(device), Path(location)
    if checkpoint is not None and not is_run(place):
        raise Refused(f"--checkpoint {checkpoint}: {location} is no run folder - leave it out")
    if not is_run(place) and not place.is_file():
        place = _find_model(location)
    if config_from is not None and place.is_dir():
        raise Refused(f"--config-from {config_from}: {location} is no single file - leave it out")
    if is_run(place):
        return _load_run(place, where, checkpoint)
    return _load_folder(place, where) if place.is_dir() else _load_file(place, where, config_from)


def _load_run(folder: Path, device: torch.device, checkpoint: int | None) -> LoadedModel:
    run = open_run(folder, checkpoint)
    parts = load_run_teacher(run.origin, device, torch.float32)
    student = load_student(run, parts)
    return _from_components(parts, run.origin.tail, {"checkpoint": run.samples}, student, few_steps_of_run(run))


def _load_folder(folder: Path, device: torch.device) -> LoadedModel:
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    facts = read_json(folder / FACTS_FILE) if (folder / FACTS_FILE).is_file() else {}
    pruned = "prune" in facts
    metadata: dict[str, Any] = {key: facts[key] for key in ("samples", "recipe_sha256") if key in facts}
    if facts.get("prediction") == "v_prediction":
        tail: Any = facts.get("tail")
        if tail not in get_args(TailPolicy):
            known = ", ".join(get_args(TailPolicy))
            raise Refused(f"{folder / FACTS_FILE}: tail is {tail!r:.40}, known are {known} - export the run again")
        parts = load_components(str(folder), device, torch.float32, pruned=pruned)
        student = Student(parts.unet, make_vp_bridge("vp_v", parts.schedule, tail)).eval()
        return _from_components(parts, tail, metadata, student)
    if scheduler.get("prediction_type") == "flow_prediction":
        few_steps = few_steps_of(facts, str(folder / FACTS_FILE))
        check_sd1_architecture(folder, guidance_input=few_steps is not None, pruned=pruned)
        shift = scheduler_shift(scheduler, folder)
        check_few_steps(str(folder), few_steps, shift, read_json(folder / "unet" / "config.json"))
        return _from_pipeline(load_pipeline(folder, device), shift, metadata, few_steps)
    return _from_components(load_components(str(folder), device, torch.float32), "hold", metadata)


def _load_file(path: Path, device: torch.device, config_from: str | None) -> LoadedModel:
    if not path.is_file():
        raise Refused(f"{path}: there is no such file - name a run, a folder or a .safetensors file")
    if path.suffix.lower() != ".safetensors":
        return _load_teacher_file(path, device, config_from)
    file = read_single_file(path) if config_from or _is_export(path) else None
    if file is None:
        return _load_teacher_file(path, device, config_from)
    beside = path.parent / "diffusers"
    if config_from is None and not beside.is_dir():
        raise Refused(
            f"{path}: the sizes of its model and its tokenizer are not in the file - name by --config-from a diffusers "
            "folder of the same kind of model, or keep the export's diffusers/ beside it"
        )
    configs = _find_model(config_from, configs_alone=True) if config_from else beside
    shift = file.flow_shift(configs)
    pipeline = load_single_file(file, configs, device)
    metadata = {key: value for key, value in file.metadata.items() if key == "modelspec.hash_sha256"}
    if shift is not None:
        check_few_steps(str(path), file.few_steps, shift, pipeline.unet.config)
        return _from_pipeline(pipeline, shift, metadata, file.few_steps)
    return _from_components(Components.from_pipeline(pipeline, str(path), configs), "hold", metadata)


def _is_export(path: Path) -> bool:
    """Whether `sollune export` wrote a file."""
    subject = str(path)
    return "sollune.prediction" in open_tensor_source(path, subject, "export or fetch it again").metadata


def _load_teacher_file(path: Path, device: torch.device, config_from: str | None) -> LoadedModel:
    """A teacher that is one file."""
    configs = str(_find_model(config_from, configs_alone=True)) if config_from else None
    source = TeacherSource(location=str(path), config=configs)
    return _from_components(
        load_components(open_teacher_files(source, "--config-from"), device, torch.float32), "hold", {}
    )


def _find_model(location: str, *, configs_alone: bool = False) -> Path:
    """The diffusers folder that `location` is or holds, or else the one file there; raises `Refused` for neither."""
    inner = Path(location) / "diffusers"
    try:
        folder = inner if inner.is_dir() else resolve_configs(location) if configs_alone else locate(location)
    except Refused as refusal:
        if Path(location).suffix.lower() in SINGLE_FILE_SUFFIXES:
            raise
        raise Refused(
            f"{location}: neither a run, a folder nor a file, nor a hub repository that can be reached - "
            "name a folder such as runs/tiny/distill, or the model's diffusers folder"
        ) from refusal
    if folder.is_dir() and not (folder / MODEL_INDEX).is_file():
        runs = sorted(str(path) for path in folder.iterdir() if is_run(path))
        raise Refused(
            f"{location}: no run, no export and no diffusers folder lies here ({MODEL_INDEX} is missing) - "
            f"name {' or '.join(runs) or 'a folder such as runs/tiny/distill'}"
        )
    return folder


def _from_components(
    parts: Components,
    tail: TailPolicy,
    metadata: Mapping[str, Any],
    student: Student | None = None,
    few_steps: FewSteps | None = None,
) -> LoadedModel:
    """The teacher, or its student."""
    teacher, steps = Teacher(parts, tail), vp_scheduler(parts.folder)
    field = student_field(student, steps, *(few_steps or ())) if student else teacher_field(teacher, steps)
    encode, decode = teacher.encode_texts, teacher.decode_latents
    return LoadedModel(field, encode, decode, parts.latents, metadata, tokenizer=parts.tokenizer)


def _from_pipeline(
    pipeline: StableDiffusionPipeline, shift: float, metadata: Mapping[str, Any], few_steps: FewSteps | None
) -> LoadedModel:
    @torch.inference_mode()
    def encode(texts: Sequence[str]) -> Tensor:
        cond: Tensor = pipeline.encode_prompt(list(texts), pipeline.device, 1, False)[0]
        return cond

    @torch.inference_mode()
    def decode(latents: Tensor) -> Tensor:
        decoded: Tensor = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
        return (decoded / 2 + 0.5).clamp(0, 1)

    latents = LatentGeometry.from_configs(pipeline.unet.config, pipeline.vae.config)
    field = student_field(Student(pipeline.unet), None, *(few_steps or ()))
    return LoadedModel(field, encode, decode, latents, metadata, shift, pipeline.tokenizer)
