"""A run's adapters as files of their own, in diffusers' layout and in kohya's, for the model beside which they learnt.

That model is the one the run went on from, a flow model: on the noise-predicting teacher they paint nothing of worth.
"""

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_kohya
from safetensors.torch import load_file
from torch import Tensor

from configs.atomic import fsync_folder
from configs.refusal import Refused
from stages.export import checks, tensorfile
from stages.export.lora_words import diffusers_words, kohya_words
from stages.export.modelspec import file_name, teacher_name
from stages.export.ours import FACTS, refuse_foreign_file
from stages.export.stock import latents
from stages.nets.files import read_json
from stages.nets.lora import ADAPTER, LoraConfig, layers
from stages.nets.saved import SavedRun, load_student, load_teacher_parts, load_unmerged
from stages.nets.student import Student

FOLDER, FILE = "lora", "pytorch_lora_weights.safetensors"
"""Where `load_lora_weights(folder)` looks."""
KOHYA = "-flow-lora.safetensors"
CLOSE = 1e-4
"""How far base + adapters may be from the merged model, relatively: both add the same in another order."""


@dataclass(frozen=True)
class Held:
    """A run's adapters, the model beside which they learnt, and both in one."""

    base: Student
    merged: Student
    tensors: Mapping[str, Tensor]
    """In diffusers' layout, fp32."""

    @classmethod
    def of(cls, run: SavedRun, config: LoraConfig) -> "Held":
        """Read from the run's folder."""
        parts = load_teacher_parts(run.origin, torch.device("cpu"), torch.float32)
        base = load_unmerged(run, parts).eval()
        tensors = layers(base, config.scale)
        base.unet.unload_lora()
        return cls(base.requires_grad_(False), load_student(run, parts), tensors)


def export_lora(run: SavedRun, out: Path, name: str | None = None) -> tuple[Path, ...]:
    """Write `<out>/lora/` for diffusers and `<out>/<name>-flow-lora.safetensors` for kohya's readers, both in fp32.

    They take the place of earlier ones only when the stock pipeline finds each tensor in them and, with the run's base
    as its UNet, answers and samples as the merged student does. `<out>/diffusers` must be exported already. Nothing is
    written for a run without adapters. Raises `Refused` for a file that fails, and for a full disk.
    """
    if run.origin.lora is None:
        return ()
    config = LoraConfig.model_validate(run.origin.lora)
    held, facts = Held.of(run, config), read_json(out / "diffusers" / FACTS)
    base_name = f"{teacher_name(facts)}-flow"
    diffusers, kohya = lora_files(facts, name)
    contents = {diffusers: held.tensors, kohya: to_kohya(held.tensors)}
    for file in contents:
        refuse_foreign_file(out / file)
    with _appearing(out, contents) as scratch:
        for (file, tensors), say in zip(contents.items(), (diffusers_words, kohya_words), strict=True):
            told = say(base_name, config, run.origin, run.samples, held.base, tensorfile.hash_of(tensors))
            tensorfile.write(scratch / file, tensors, tensorfile.sealed(told))
        _verify(out / "diffusers", held, [scratch / file for file in contents])
    return (out / FOLDER, out / kohya)


def lora_files(facts: Mapping[str, Any], name: str | None = None) -> tuple[Path, Path]:
    """The files of a run's adapters inside its export, in diffusers' layout and in kohya's."""
    return Path(FOLDER) / FILE, Path(file_name(facts, name, False).removesuffix("-flow.safetensors") + KOHYA)


def verify_lora(run: SavedRun, out: Path) -> tuple[Path, ...]:
    """The same laws for the files that lie in `out` already; returns what was verified."""
    if run.origin.lora is None:
        return ()
    diffusers, kohya = out / FOLDER / FILE, sorted(out.glob(f"*{KOHYA}"))
    if not (diffusers.is_file() and kohya):
        raise Refused(f"{out}: no {FOLDER}/{FILE} or no *{KOHYA} lies here - export the run first")
    _verify(out / "diffusers", Held.of(run, LoraConfig.model_validate(run.origin.lora)), [diffusers, *kohya])
    return (out / FOLDER, *kohya)


def to_kohya(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' names as kohya's: `lora_unet_<layer>.lora_down.weight`, `.lora_up.weight`, and `.alpha`, the rank."""
    converted: dict[str, Tensor] = convert_state_dict_to_kohya(dict(tensors))
    return {name: value.float() for name, value in converted.items()}


def _verify(folder: Path, held: Held, files: Iterable[Path]) -> None:
    """Let stock diffusers add each file to the base; what surrounds the UNet is taken from the exported folder."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, unet=held.merged.unet, dtype=torch.float32)
    meant = {"velocity": _velocity(held.merged), "latents": latents(pipeline)}
    pipeline.register_modules(unet=held.base.unet)
    for file in files:
        stored = load_file(file)
        as_written = held.tensors if file.name == FILE else to_kohya(held.tensors)
        checks.same_names(file.name, stored, as_written)
        checks.equal(file.name, stored, as_written)
        pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name=ADAPTER)
        loaded = layers(held.base, 1.0)
        checks.same_names(f"{file.name} in stock diffusers", loaded, held.tensors)
        checks.equal(f"{file.name} in stock diffusers", loaded, held.tensors)
        for what, found in (("velocity", _velocity(held.base)), ("latents", latents(pipeline))):
            if not (error := checks.relative(found, meant[what])) <= CLOSE:
                raise Refused(
                    f"{file.name}: with it the {what} of stock diffusers are {error:.1e} away from the merged model's, "
                    f"{CLOSE:.0e} is allowed - {checks.AGAIN}"
                )
        pipeline.unload_lora_weights()


@torch.inference_mode()
def _velocity(student: Student) -> Tensor:
    generator, config = torch.Generator().manual_seed(0), student.unet.config
    x = torch.randn(1, config["in_channels"], checks.SIDE, checks.SIDE, generator=generator)
    cond = torch.randn(1, checks.WORDS, config["cross_attention_dim"], generator=generator)
    return student.velocity(x, torch.tensor([0.5]), cond)


@contextmanager
def _appearing(out: Path, files: Iterable[Path]) -> Iterator[Path]:
    """A hidden folder in `out` whose `files` move to their places when the block ends well; it goes in any case."""
    scratch = out / f".{FOLDER}.{os.getpid()}.partial"
    try:
        for file in files:
            (scratch / file).parent.mkdir(parents=True, exist_ok=True)
        yield scratch
        for file in files:
            with open(scratch / file, "rb") as handle:
                os.fsync(handle.fileno())
            (out / file).parent.mkdir(exist_ok=True)
            (scratch / file).replace(out / file)
            fsync_folder((out / file).parent)
    except OSError as error:
        reason = error.strerror or str(error)
        raise Refused(f"{out}: the adapters cannot be written ({reason}) - free some space, or set --out") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
