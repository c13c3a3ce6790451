"""A student as a whole diffusers folder that the stock `StableDiffusionPipeline` loads and samples correctly."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, SchedulerMixin, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from configs.atomic import fsync_folder
from configs.refusal import Refused
from stages.export.card import card
from stages.nets.components import check_anatomy, identity
from stages.nets.scheduler import flow_scheduler, vp_scheduler
from stages.nets.student import TIME_SCALE, Student

FACTS = "sollune.json"


def export_diffusers(
    student: Student,
    teacher_folder: Path,
    out: Path,
    facts: Mapping[str, Any],
    dtype: torch.dtype = torch.float16,
    flow_shift: float = 1.0,
) -> Path:
    """Write `<out>/diffusers`, read it back, and only then let it replace an earlier export; returns the folder.

    Raises `Refused` when a tensor is still the teacher's or does not fit `dtype`, when a folder that is no export
    stands in the way, and when the disk is full; an earlier export then stays as it was.
    """
    check_anatomy(teacher_folder)
    facts = {**facts, **_own_facts(student, teacher_folder, dtype, flow_shift)}
    scheduler = flow_scheduler(flow_shift) if student.vp is None else vp_scheduler(teacher_folder)
    weights = _weights(student, dtype)
    _refuse_the_teacher(student, teacher_folder)
    with _replacing(out / "diffusers") as folder:
        _write(folder, teacher_folder, weights, dtype, scheduler)
        (folder / FACTS).write_text(json.dumps(facts, indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(card(facts), encoding="utf-8")
        _read_back(folder, weights, dtype)
    return out / "diffusers"


def _own_facts(student: Student, teacher_folder: Path, dtype: torch.dtype, flow_shift: float) -> dict[str, Any]:
    told = {"prediction": "velocity", "path": "linear", "time_scale": TIME_SCALE, "flow_shift": flow_shift}
    return {
        **(told if student.vp is None else {"prediction": "v_prediction", "path": "the teacher's"}),
        "dtype": str(dtype).removeprefix("torch."),
        "teacher_sha256": identity(teacher_folder),
    }


def _weights(student: Student, dtype: torch.dtype) -> dict[str, Tensor]:
    """The student's tensors as they will be written."""
    weights = {name: value.detach().cpu().to(dtype).contiguous() for name, value in student.unet.state_dict().items()}
    for name, value in weights.items():
        if not value.isfinite().all():
            raise Refused(f"export: {name} holds values that are no numbers in {dtype} - export with --dtype float32")
    return weights


def _refuse_the_teacher(student: Student, teacher_folder: Path) -> None:
    """A folder with the teacher's weights under our scheduler would paint noise, and nothing else would tell."""
    teacher = UNet2DConditionModel.from_pretrained(teacher_folder, subfolder="unet").state_dict()
    own = student.unet.state_dict()
    if own.keys() != teacher.keys():
        raise Refused(f"export: the student's tensors are not those of {teacher_folder}/unet - name its own teacher")
    same = [name for name, value in own.items() if torch.equal(value.detach().cpu().float(), teacher[name].float())]
    if same:
        raise Refused(
            f"export: {len(same)} of {len(own)} tensors are still the teacher's ({same[0]} is the first) - "
            "distill the student before it is exported"
        )


@contextmanager
def _replacing(final: Path) -> Iterator[Path]:
    """A folder beside `final` that takes its place when the block ends well and is removed when it does not."""
    if final.exists() and not (final / FACTS).is_file():
        raise Refused(
            f"{final}: stands in the way and is no export of ours ({FACTS} is missing) - move it, or set --out"
        )
    temporary = final.with_name(f".{final.name}.{os.getpid()}.partial")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        _swap(temporary, final)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise Refused(f"{final}: cannot be written ({reason}) - free some space or choose another folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _swap(new: Path, final: Path) -> None:
    """Put `new` in the place of `final`; the earlier one comes back if that fails, and goes if it does not."""
    for path in new.rglob("*"):
        if path.is_file():
            with open(path, "rb") as handle:
                os.fsync(handle.fileno())
    earlier = new.with_suffix(".earlier")
    if final.exists():
        final.rename(earlier)
    try:
        new.rename(final)
    except OSError:
        if earlier.exists():
            earlier.rename(final)
        raise
    fsync_folder(final.parent)
    shutil.rmtree(earlier, ignore_errors=True)


def _write(
    folder: Path, teacher_folder: Path, weights: Mapping[str, Tensor], dtype: torch.dtype, scheduler: SchedulerMixin
) -> None:
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(teacher_folder, subfolder="unet"))
    unet.load_state_dict(weights, assign=True)
    tokenizer = CLIPTokenizer.from_pretrained(teacher_folder, subfolder="tokenizer")
    StableDiffusionPipeline(
        unet=unet,
        vae=AutoencoderKL.from_pretrained(teacher_folder, subfolder="vae", dtype=dtype),
        text_encoder=CLIPTextModel.from_pretrained(teacher_folder, subfolder="text_encoder", dtype=dtype),
        tokenizer=tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    _nest_text_keys(folder / "text_encoder" / "model.safetensors")
    _keep_tokenizer(tokenizer, teacher_folder / "tokenizer", folder / "tokenizer")
    _load_in_float32(folder / "text_encoder" / "config.json")
    for config in (folder / "model_index.json", *folder.glob("*/config.json"), *folder.glob("*/tokenizer_config.json")):
        _forget_path(config)


def _load_in_float32(config: Path) -> None:
    """Name float32 as the type to load in when nobody asks for one.

    transformers 5 else takes the type of the file, diffusers always float32, and a pipeline of both does not run.
    """
    content = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps({**content, "dtype": "float32"}, indent=2) + "\n", encoding="utf-8")


def _nest_text_keys(file: Path) -> None:
    """Rewrite a text encoder under `text_model.`: names that every version of transformers reads (formats.md 1.4)."""
    weights = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})


def _keep_tokenizer(tokenizer: CLIPTokenizer, source: Path, folder: Path) -> None:
    """The teacher's own tokenizer files over what this transformers wrote; vocab.json and merges.txt in any case."""
    for file in source.iterdir():
        if file.suffix in {".json", ".txt"}:
            shutil.copyfile(file, folder / file.name)
    if not ((folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()):
        tokenizer.backend_tokenizer.model.save(str(folder))


def _forget_path(config: Path) -> None:
    """Take out where on this machine a part was loaded from."""
    content = json.loads(config.read_text(encoding="utf-8"))
    kept = {key: value for key, value in content.items() if key not in ("_name_or_path", "name_or_path")}
    if kept != content:
        config.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def _read_back(folder: Path, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Load the folder as a stranger would, and find exactly what was meant to be in it."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=dtype)
    found = pipeline.unet.state_dict()
    changed = [name for name, value in weights.items() if not torch.equal(found[name], value)]
    parts = {"vae": pipeline.vae, "text_encoder": pipeline.text_encoder}
    changed += [
        f"{part}.{name}"
        for part, module in parts.items()
        for name, value in module.state_dict().items()
        if not value.isfinite().all()
    ]
    if changed:
        raise Refused(f"export: {changed[0]} did not come back from {folder.name} as written - export again")
