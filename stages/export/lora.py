"""What a file of adapters says of itself: above all, on which model it belongs.

A run's adapters as files of their own, in diffusers' layout and in kohya's, for the model beside which they learnt.

That model is the one the run went on from, a flow model: on the noise-predicting teacher they paint nothing of worth.
"""

import json
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

from stages.export import checks, tensorfile
from stages.export.folder import FACTS_FILE, refuse_foreign_file
from stages.export.ldm import sample_latents
from stages.export.tensorfile import single_file_name, teacher_name
from stages.export.verify import student_digest
from stages.nets.files import read_json
from stages.nets.lora import ADAPTER_NAME, LoraConfig, lora_state_dict
from stages.nets.saved import Origin, SavedRun, load_run_teacher, load_student, load_with_adapters
from stages.nets.student import Student
from stages.system.atomic import fsync_folder
from stages.system.refusal import Refused


def diffusers_metadata(
    name: str, config: LoraConfig, origin: Origin, samples: int, base: Student, tensor_hash: str
) -> dict[str, str]:
    """The metadata of both layouts; `name` is what the base's single file is called, without its ending.

    No date and no author: the same export gives the same bytes.
    """
    wants = f"the flow model {name} that these adapters were trained beside (its export), not its teacher"
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": f"{name} LoRA (sollune)",
        "modelspec.description": f"Adapters for {wants}.",
        "modelspec.hash_sha256": tensor_hash,
        "sollune.base": wants,
        "sollune.base_student_sha256": student_digest(base),
        "sollune.lora": json.dumps(config.model_dump(mode="json"), sort_keys=True),
        "sollune.prediction": origin.target,
        "sollune.recipe_sha256": origin.recipe_sha256,
        "sollune.samples_seen": str(samples),
    }


def kohya_metadata(
    name: str, config: LoraConfig, origin: Origin, samples: int, base: Student, tensor_hash: str
) -> dict[str, str]:
    """The same, and the keys by which pickers of LoRA files know one (formats.md 4.2)."""
    told = diffusers_metadata(name, config, origin, samples, base, tensor_hash)
    rank = str(config.rank)
    convolutions = {"conv_dim": rank, "conv_alpha": rank} if "resnet" in config.modules else {}
    return told | {
        "ss_base_model_version": "sd_v1",
        "ss_v2": "False",
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": rank,  # the scale is within the weights
        "ss_network_args": json.dumps(convolutions, sort_keys=True),
        "ss_sd_model_name": f"{name}.safetensors",
        "ss_output_name": f"{name}-lora",
        "ss_training_comment": f"for {told['sollune.base']}",
        "sshs_model_hash": tensor_hash.removeprefix("0x"),
    }


LORA_FOLDER, LORA_FILE = "lora", "pytorch_lora_weights.safetensors"
"""Where `load_lora_weights(folder)` looks."""
KOHYA_SUFFIX = "-flow-lora.safetensors"
RELATIVE_TOLERANCE = 1e-4
"""How far base + adapters may be from the merged model, relatively: both add the same in another order."""


@dataclass(frozen=True)
class LoraExport:
    """A run's adapters, the model beside which they learnt, and both in one."""

    base: Student
    merged: Student
    tensors: Mapping[str, Tensor]
    """In diffusers' layout, fp32."""

    @classmethod
    def from_run(cls, run: SavedRun, config: LoraConfig) -> "LoraExport":
        """Read from the run's folder."""
        parts = load_run_teacher(run.origin, torch.device("cpu"), torch.float32)
        base = load_with_adapters(run, parts).eval()
        tensors = lora_state_dict(base, config.scale)
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
    held, facts = LoraExport.from_run(run, config), read_json(out / "diffusers" / FACTS_FILE)
    base_name = f"{teacher_name(facts)}-flow"
    diffusers, kohya = lora_files(facts, name)
    contents = {diffusers: held.tensors, kohya: to_kohya(held.tensors)}
    for file in contents:
        refuse_foreign_file(out / file)
    with _atomic_files(out, contents) as scratch:
        for (file, tensors), say in zip(contents.items(), (diffusers_metadata, kohya_metadata), strict=True):
            told = say(base_name, config, run.origin, run.samples, held.base, tensorfile.hash_tensors(tensors))
            tensorfile.write(scratch / file, tensors, tensorfile.with_header_hash(told))
        _verify_files(out / "diffusers", held, [scratch / file for file in contents])
    return (out / LORA_FOLDER, out / kohya)


def lora_files(facts: Mapping[str, Any], name: str | None = None) -> tuple[Path, Path]:
    """The files of a run's adapters inside its export, in diffusers' layout and in kohya's."""
    return Path(LORA_FOLDER) / LORA_FILE, Path(
        single_file_name(facts, name, False).removesuffix("-flow.safetensors") + KOHYA_SUFFIX
    )


def verify_lora(run: SavedRun, out: Path) -> tuple[Path, ...]:
    """The same laws for the files that lie in `out` already; returns what was verified."""
    if run.origin.lora is None:
        return ()
    diffusers, kohya = out / LORA_FOLDER / LORA_FILE, sorted(out.glob(f"*{KOHYA_SUFFIX}"))
    if not (diffusers.is_file() and kohya):
        raise Refused(f"{out}: no {LORA_FOLDER}/{LORA_FILE} or no *{KOHYA_SUFFIX} lies here - export the run first")
    _verify_files(
        out / "diffusers", LoraExport.from_run(run, LoraConfig.model_validate(run.origin.lora)), [diffusers, *kohya]
    )
    return (out / LORA_FOLDER, *kohya)


def to_kohya(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' names as kohya's: `lora_unet_<layer>.lora_down.weight`, `.lora_up.weight`, and `.alpha`, the rank."""
    converted: dict[str, Tensor] = convert_state_dict_to_kohya(dict(tensors))
    return {name: value.float() for name, value in converted.items()}


def _verify_files(folder: Path, held: LoraExport, files: Iterable[Path]) -> None:
    """Let stock diffusers add each file to the base; what surrounds the UNet is taken from the exported folder."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, unet=held.merged.unet, dtype=torch.float32)
    meant = {"velocity": _probe_velocity(held.merged), "latents": sample_latents(pipeline)}
    pipeline.register_modules(unet=held.base.unet)
    for file in files:
        stored = load_file(file)
        as_written = held.tensors if file.name == LORA_FILE else to_kohya(held.tensors)
        checks.check_names_and_shapes(file.name, stored, as_written)
        checks.check_equal(file.name, stored, as_written)
        pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name=ADAPTER_NAME)
        loaded = lora_state_dict(held.base, 1.0)
        checks.check_names_and_shapes(f"{file.name} in stock diffusers", loaded, held.tensors)
        checks.check_equal(f"{file.name} in stock diffusers", loaded, held.tensors)
        for what, found in (("velocity", _probe_velocity(held.base)), ("latents", sample_latents(pipeline))):
            if not (error := checks.relative_error(found, meant[what])) <= RELATIVE_TOLERANCE:
                raise Refused(
                    f"{file.name}: with it the {what} of stock diffusers are {error:.1e} away from the merged model's, "
                    f"{RELATIVE_TOLERANCE:.0e} is allowed - {checks.EXPORT_REMEDY}"
                )
        pipeline.unload_lora_weights()


@torch.inference_mode()
def _probe_velocity(student: Student) -> Tensor:
    generator, config = torch.Generator().manual_seed(0), student.unet.config
    x = torch.randn(1, config["in_channels"], checks.PROBE_LATENT_SIDE, checks.PROBE_LATENT_SIDE, generator=generator)
    cond = torch.randn(1, checks.PROBE_TOKENS, config["cross_attention_dim"], generator=generator)
    return student.velocity(x, torch.tensor([0.5]), cond)


@contextmanager
def _atomic_files(out: Path, files: Iterable[Path]) -> Iterator[Path]:
    """A hidden folder in `out` whose `files` move to their places when the block ends well; it goes in any case."""
    scratch = out / f".{LORA_FOLDER}.{os.getpid()}.partial"
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
