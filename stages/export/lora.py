"""A run's adapters as files of their own, in diffusers' layout and in kohya's, for the model that the run went on from.

On the noise-predicting teacher they give nothing of use; the metadata of each file names the right model.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor

from stages.export import checks, tensorfile
from stages.export.folder import FACTS_FILE, fsync_files, refuse_foreign_file
from stages.export.ldm import sample_latents
from stages.export.tensorfile import single_file_name, teacher_name
from stages.export.verify_export import student_digest
from stages.nets.lora import ADAPTER_NAME, LoraConfig, lora_state_dict
from stages.nets.run_folder import SavedRun, load_run_teacher, load_student, load_with_adapters
from stages.nets.student import Student
from stages.system.atomic import fsync_folder, temporary_path
from stages.system.disk import refuse_write_errors
from stages.system.refusal import Refused
from stages.teacher_files.folder import read_json
from stages.teacher_files.lora.names import kohya_layer

LORA_FOLDER, LORA_FILE = "lora", "pytorch_lora_weights.safetensors"
"""Where `load_lora_weights(folder)` looks."""
KOHYA_SUFFIX = "-flow-lora.safetensors"
RELATIVE_TOLERANCE = 1e-4
"""How far base + adapters may be from the merged model, relatively: both add the same in another order."""


@dataclass(frozen=True)
class LoraExport:
    """A run's adapters, the model beside which they were trained, and both merged."""

    base: Student
    merged: Student
    tensors: Mapping[str, Tensor]
    """In diffusers' layout, fp32."""

    @classmethod
    def from_run(cls, run: SavedRun, config: LoraConfig) -> "LoraExport":
        """Read from the run's folder."""
        components = load_run_teacher(run.origin, torch.device("cpu"), torch.float32)
        base = load_with_adapters(run, components).eval()
        tensors = lora_state_dict(base, config.scale)
        base.unet.unload_lora()
        return cls(base.requires_grad_(False), load_student(run, components), tensors)


def export_lora(run: SavedRun, out: Path, name: str | None = None) -> tuple[Path, ...]:
    """Write `<out>/lora/` for diffusers and `<out>/<name>-flow-lora.safetensors` for kohya's readers, both in fp32.

    They replace earlier ones only when the stock pipeline finds each tensor in them and, with the run's base as its
    UNet, predicts and samples as the merged student does. `<out>/diffusers` must be exported already. Nothing is
    written for a run without adapters. Raises `Refused` for a file that fails, and for a full disk.
    """
    if run.origin.lora is None:
        return ()
    config = LoraConfig.model_validate(run.origin.lora)
    content, facts = LoraExport.from_run(run, config), read_json(out / "diffusers" / FACTS_FILE)
    base_name = f"{teacher_name(facts)}-flow"
    metadata = _diffusers_metadata(base_name, run, config, content.base)
    diffusers, kohya = lora_files(facts, name)
    for file in (diffusers, kohya):
        refuse_foreign_file(out / file)
    kohya_tensors = to_kohya(content.tensors)
    kohya_metadata = _kohya_metadata(base_name, config, tensorfile.hash_tensors(kohya_tensors))
    with _atomic_files(out, (diffusers, kohya)) as scratch:
        _write(scratch / diffusers, content.tensors, metadata)
        _write(scratch / kohya, kohya_tensors, metadata | kohya_metadata)
        _verify_files(out / "diffusers", content, [scratch / diffusers, scratch / kohya])
    return (out / LORA_FOLDER, out / kohya)


def lora_files(facts: Mapping[str, Any], name: str | None = None) -> tuple[Path, Path]:
    """The files of a run's adapters inside its export, in diffusers' layout and in kohya's."""
    stem = single_file_name(facts, name, False).removesuffix("-flow.safetensors")
    return Path(LORA_FOLDER) / LORA_FILE, Path(stem + KOHYA_SUFFIX)


def verify_lora(run: SavedRun, out: Path) -> tuple[Path, ...]:
    """The same checks for the files that lie in `out` already; returns what was verified."""
    if run.origin.lora is None:
        return ()
    diffusers, kohya = out / LORA_FOLDER / LORA_FILE, sorted(out.glob(f"*{KOHYA_SUFFIX}"))
    if not (diffusers.is_file() and kohya):
        raise Refused(f"{out}: no {LORA_FOLDER}/{LORA_FILE} or no *{KOHYA_SUFFIX} lies here - export the run first")
    content = LoraExport.from_run(run, LoraConfig.model_validate(run.origin.lora))
    _verify_files(out / "diffusers", content, [diffusers, *kohya])
    return (out / LORA_FOLDER, *kohya)


def to_kohya(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' names as kohya's: `lora_unet_<layer>.lora_down.weight`, `.lora_up.weight`, and `.alpha`, the rank."""
    converted: dict[str, Tensor] = {}
    for key, value in tensors.items():
        component, _, rest = key.partition(".")
        layer, _, half = rest.removesuffix(".weight").rpartition(".")
        name = kohya_layer(component, layer)
        converted[f"{name}.lora_{'down' if half == 'lora_A' else 'up'}.weight"] = value.float()
        if half == "lora_A":
            converted[f"{name}.alpha"] = torch.tensor(float(value.shape[0]))
    return converted


def _diffusers_metadata(base_name: str, run: SavedRun, config: LoraConfig, base: Student) -> dict[str, str]:
    """The metadata of both layouts; `base_name` is the base's single file without its ending.

    No date and no author: the same export gives the same bytes.
    """
    base_text = _base_text(base_name)
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": f"{base_name} LoRA (sollune)",
        "modelspec.description": f"Adapters for {base_text}.",
        "sollune.base": base_text,
        "sollune.base_student_sha256": student_digest(base),
        "sollune.lora": json.dumps(config.model_dump(mode="json"), sort_keys=True),
        "sollune.prediction": run.origin.target,
        "sollune.recipe_sha256": run.origin.recipe_sha256,
        "sollune.samples_seen": str(run.samples),
    }


def _base_text(base_name: str) -> str:
    return f"the flow model {base_name} that these adapters were trained beside (its export), not its teacher"


def _kohya_metadata(base_name: str, config: LoraConfig, tensor_hash: str) -> dict[str, str]:
    """The keys by which pickers of LoRA files know one (formats.md 4.2)."""
    rank = str(config.rank)
    convolutions = {"conv_dim": rank, "conv_alpha": rank} if "resnet" in config.modules else {}
    return {
        "ss_base_model_version": "sd_v1",
        "ss_v2": "False",
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": rank,  # the scale is within the weights
        "ss_network_args": json.dumps(convolutions, sort_keys=True),
        "ss_sd_model_name": f"{base_name}.safetensors",
        "ss_output_name": f"{base_name}-lora",
        "ss_training_comment": f"for {_base_text(base_name)}",
        "sshs_model_hash": tensor_hash.removeprefix("0x"),
    }


def _write(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    metadata = {**metadata, "modelspec.hash_sha256": tensorfile.hash_tensors(tensors)}
    tensorfile.write(file, tensors, tensorfile.with_header_hash(metadata))


def _verify_files(folder: Path, content: LoraExport, files: Iterable[Path]) -> None:
    """Let stock diffusers add each file to the base; the other components are the exported folder's."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, unet=content.merged.unet, dtype=torch.float32)
    expected = {"velocity": checks.probe_velocities(content.merged), "latents": sample_latents(pipeline)}
    pipeline.register_modules(unet=content.base.unet)
    for file in files:
        as_written = content.tensors if file.name == LORA_FILE else to_kohya(content.tensors)
        checks.check_equal(file.name, load_file(file), as_written)
        pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name=ADAPTER_NAME)
        checks.check_equal(f"{file.name} in stock diffusers", lora_state_dict(content.base, 1.0), content.tensors)
        predicted = {"velocity": checks.probe_velocities(content.base), "latents": sample_latents(pipeline)}
        for what, value in predicted.items():
            if not (error := checks.relative_error(value, expected[what])) <= RELATIVE_TOLERANCE:
                raise Refused(
                    f"{file.name}: with it the {what} of stock diffusers are {error:.1e} away from the merged model's, "
                    f"{RELATIVE_TOLERANCE:.0e} is allowed - {checks.EXPORT_REMEDY}"
                )
        pipeline.unload_lora_weights()


@contextmanager
def _atomic_files(out: Path, files: Iterable[Path]) -> Iterator[Path]:
    """A hidden folder in `out` whose `files` move to their places when the block ends well; it goes in any case."""
    scratch = temporary_path(out / LORA_FOLDER)
    try:
        with refuse_write_errors(out / LORA_FOLDER):
            for file in files:
                (scratch / file).parent.mkdir(parents=True, exist_ok=True)
            yield scratch
            fsync_files(scratch)
            for file in files:
                (out / file).parent.mkdir(exist_ok=True)
                (scratch / file).replace(out / file)
                fsync_folder((out / file).parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
