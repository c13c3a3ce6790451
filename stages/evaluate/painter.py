"""Whatever paints: a run, an exported folder or file, or a teacher, opened by what lies there."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, get_args

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from configs.refusal import Refused
from stages.cluster import device_of
from stages.evaluate.fields import Field, student_field, teacher_field
from stages.evaluate.single_file import open_single, read_single, shift_of
from stages.evaluate.stock import open_stock
from stages.flow.bridge import Tail
from stages.nets.anatomy import check_anatomy
from stages.nets.components import Components, load_components
from stages.nets.files import CONFIGS, FILES, locate, read_json
from stages.nets.saved import is_run, load_student, load_teacher_parts, open_run
from stages.nets.scheduler import vp_scheduler
from stages.nets.student import Student, vp_of
from stages.nets.teacher import Teacher

Encode: TypeAlias = Callable[[Sequence[str]], Tensor]
Decode: TypeAlias = Callable[[Tensor], Tensor]
SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
INDEX, FACTS = "model_index.json", "sollune.json"


@dataclass(frozen=True)
class Painter:
    """Everything between sentences and pictures in [0, 1]."""

    field: Field
    encode: Encode
    decode: Decode
    latent_shape: tuple[int, int, int]
    told: Mapping[str, Any]
    """What identifies the weights, for the pictures' metadata."""
    shift: float = 1.0
    tokenizer: Any = None
    """None where it is not known."""


def open_painter(location: str, device: str, checkpoint: int | None = None, config_from: str | None = None) -> Painter:
    """The model at `location`; where nothing else tells, its scheduler tells a teacher from an exported student.

    Raises `Refused` for what is none of them, and for `checkpoint` and `config_from` where they mean nothing.
    """
    where, place = device_of(device), Path(location)
    if checkpoint is not None and not is_run(place):
        raise Refused(f"--checkpoint {checkpoint}: {location} is no run folder - leave it out")
    file = place.is_file() or (place.suffix in SUFFIXES and not place.is_dir())
    if config_from is not None and not file:
        raise Refused(f"--config-from {config_from}: {location} is no single file - leave it out")
    if is_run(place):
        return _of_run(place, where, checkpoint)
    return _of_file(place, where, config_from) if file else _of_folder(location, where)


def _of_run(folder: Path, device: torch.device, checkpoint: int | None) -> Painter:
    run = open_run(folder, checkpoint)
    parts = load_teacher_parts(run.origin, device, torch.float32)
    teacher, student = Teacher(parts, run.origin.tail), load_student(run, parts)
    solved = student_field(student, vp_scheduler(parts.folder))
    return Painter(
        solved,
        teacher.encode,
        teacher.decode,
        parts.latent_shape,
        {"checkpoint": run.samples},
        tokenizer=parts.tokenizer,
    )


def _of_folder(location: str, device: torch.device) -> Painter:
    folder = _diffusers(location)
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    facts = read_json(folder / FACTS) if (folder / FACTS).is_file() else {}
    told: dict[str, Any] = {key: facts[key] for key in ("samples", "recipe_sha256") if key in facts}
    if facts.get("prediction") == "v_prediction":
        tail: Any = facts.get("tail")
        if tail not in get_args(Tail):
            known = ", ".join(get_args(Tail))
            raise Refused(f"{folder / FACTS}: tail is {tail!r:.40}, known are {known} - export the run again")
        parts = load_components(str(folder), device, torch.float32)
        teacher, student = Teacher(parts, tail), Student(parts.unet, vp_of("vp_v", parts.schedule, tail))
        solved = student_field(student.eval(), vp_scheduler(folder))
        return Painter(solved, teacher.encode, teacher.decode, parts.latent_shape, told, tokenizer=parts.tokenizer)
    if scheduler.get("prediction_type") == "flow_prediction":
        check_anatomy(folder)
        shift = shift_of(scheduler, folder)
        return _of_pipeline(open_stock(folder, device), shift, told)
    return _of_teacher(load_components(str(folder), device, torch.float32), told)


def _of_file(path: Path, device: torch.device, config_from: str | None) -> Painter:
    if not path.is_file():
        raise Refused(f"{path}: there is no such file - name a run, a folder or a .safetensors file")
    file = read_single(path)
    beside = path.parent / "diffusers"
    if config_from is None and not (file.ours and beside.is_dir()):
        why = "the sizes of its model and its tokenizer are" if file.ours else "how it has to be sampled is"
        raise Refused(
            f"{path}: {why} not in the file - name by --config-from a diffusers folder of the same kind of model"
            + (", or keep the export's diffusers/ beside it" if file.ours else ", whose scheduler then says it")
        )
    configs = _diffusers(config_from, CONFIGS) if config_from else beside
    shift = file.flow_shift(configs)
    pipeline = open_single(file, configs, device)
    told = {key: value for key, value in file.told.items() if key == "modelspec.hash_sha256"}
    if shift is not None:
        return _of_pipeline(pipeline, shift, told)
    return _of_teacher(Components.of_pipeline(pipeline, str(path), configs), told)


def _diffusers(location: str, files: Sequence[str] = FILES) -> Path:
    """The diffusers folder that `location` is or holds; raises `Refused` when there is none."""
    inner = Path(location) / "diffusers"
    try:
        folder = inner if inner.is_dir() else locate(location, files)
    except Refused as refusal:
        raise Refused(
            f"{location}: neither a run, a folder nor a file, nor a hub repository that can be reached - "
            "name a folder such as runs/tiny/distill, or the model's diffusers folder"
        ) from refusal
    if not (folder / INDEX).is_file():
        runs = sorted(str(one) for one in folder.iterdir() if is_run(one))
        raise Refused(
            f"{location}: no run, no export and no diffusers folder lies here ({INDEX} is missing) - "
            f"name {' or '.join(runs) or 'a folder such as runs/tiny/distill'}"
        )
    return folder


def _of_teacher(parts: Components, told: Mapping[str, Any]) -> Painter:
    teacher = Teacher(parts, "hold")
    solved = teacher_field(teacher, vp_scheduler(parts.folder))
    return Painter(solved, teacher.encode, teacher.decode, parts.latent_shape, told, tokenizer=parts.tokenizer)


def _of_pipeline(pipeline: StableDiffusionPipeline, shift: float, told: Mapping[str, Any]) -> Painter:
    @torch.inference_mode()
    def encode(texts: Sequence[str]) -> Tensor:
        cond: Tensor = pipeline.encode_prompt(list(texts), pipeline.device, 1, False)[0]
        return cond

    @torch.inference_mode()
    def decode(latents: Tensor) -> Tensor:
        decoded: Tensor = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
        return (decoded / 2 + 0.5).clamp(0, 1)

    size = pipeline.unet.config.sample_size
    shape = (pipeline.unet.config.in_channels, size, size)
    return Painter(student_field(Student(pipeline.unet)), encode, decode, shape, told, shift, pipeline.tokenizer)
