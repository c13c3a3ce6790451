"""One file in the LDM layout as stock diffusers opens it, offline, against the folder that it was made from.

An exported diffusers folder as one file in the LDM layout, for ComfyUI, SwarmUI, SD.Next and their kind.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from torch import Tensor

from stages.export import checks, tensorfile
from stages.export.comfyui import workflow_json
from stages.export.folder import FACTS_FILE, read_facts, refuse_foreign_file
from stages.export.ldm_names import ldm_names, to_diffusers, to_ldm
from stages.export.tensorfile import single_file_metadata, single_file_name, teacher_name
from stages.export.verify import HALF_VARIANT, WEIGHT_STEMS, read_tensors, weight_file
from stages.nets.anatomy import check_sd1_architecture
from stages.nets.files import read_json
from stages.system.atomic import atomic_path, atomic_write
from stages.system.refusal import Refused

STEPS, GUIDANCE = 2, 3.0


def verify_in_stock_diffusers(
    file: Path, display_name: str, folder: Path, variant: str, tensors: Mapping[str, Tensor], unet_only: bool
) -> None:
    """`from_single_file` must give the folder's `tensors`, and sample the folder's latents.

    `name` is what the file is called in messages, `tensors` are named `<part>.<diffusers' name>`. One pipeline is held
    at a time: at SD-1.x's size each takes 4.3 GB.
    """
    meant = sample_latents(_load_pipeline(folder, variant))
    pipeline = _open(file, folder, variant, unet_only)
    for part in ("unet",) if unet_only else ("unet", "vae", "text_encoder"):
        for key, value in getattr(pipeline, part).state_dict().items():
            stored = tensors.get(f"{part}.{key}", tensors.get(f"{part}.text_model.{key}"))
            if stored is None or not torch.equal(value, stored.float()):
                raise Refused(f"{display_name}: stock diffusers reads another {part}.{key} - {checks.EXPORT_REMEDY}")
    error = checks.relative_error(sample_latents(pipeline), meant)
    most = STEPS * GUIDANCE * checks.rounding_tolerance(len(tensors), torch.float32)
    if not error <= most:
        raise Refused(
            f"{display_name}: stock diffusers samples latents {error:.1e} away from the folder's, rounding explains "
            f"{most:.1e} - {checks.EXPORT_REMEDY}"
        )


def _open(file: Path, folder: Path, variant: str, unet_only: bool) -> StableDiffusionPipeline:
    told = {"config": str(folder), "local_files_only": True}
    if not unet_only:
        return StableDiffusionPipeline.from_single_file(file, **told)
    return _load_pipeline(folder, variant, unet=UNet2DConditionModel.from_single_file(file, subfolder="unet", **told))


def _load_pipeline(folder: Path, variant: str, **parts: UNet2DConditionModel) -> StableDiffusionPipeline:
    """In fp32, so that any processor can be asked; single files are opened so unless told."""
    return StableDiffusionPipeline.from_pretrained(folder, variant=variant or None, dtype=torch.float32, **parts)


def sample_latents(pipeline: StableDiffusionPipeline) -> Tensor:
    """Small latents after a few steps: what is compared is the way, not the picture."""
    pipeline.set_progress_bar_config(disable=True)
    side, channels = checks.PROBE_LATENT_SIDE, pipeline.unet.config.in_channels
    pixels = side * pipeline.vae_scale_factor
    noise = torch.randn(1, channels, side, side, generator=torch.Generator().manual_seed(0))
    drawn: Tensor = pipeline(
        "a red star",
        height=pixels,
        width=pixels,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        latents=noise,
        output_type="latent",
    ).images
    return drawn


WORKFLOW_FILE = "workflow-comfyui.json"


@dataclass(frozen=True)
class ExportFolder:
    """What an exported diffusers folder holds, as far as one file takes it over."""

    path: Path
    facts: Mapping[str, Any]
    """Its `sollune.json`."""
    variant: str
    """Which of its files are taken over; the plain ones' variant is the empty word."""
    dtype: torch.dtype
    tensors: Mapping[str, Tensor]
    """`<part>.<diffusers' name>` -> tensor, all of one type."""
    ldm_names: Mapping[str, str]
    """The same names -> names in the LDM layout."""
    picture_pixels: int
    """The side of the pictures."""
    unet_only: bool

    def ldm_tensors(self) -> dict[str, Tensor]:
        """The tensors as one file holds them."""
        return {self.ldm_names[key]: to_ldm(key, value) for key, value in self.tensors.items()}


def export_ldm(folder: Path, name: str | None = None, *, unet_only: bool = False) -> Path:
    """Write `<name>-flow.safetensors` and a ComfyUI workflow beside an exported diffusers folder; returns the file.

    Unless told, the name is the teacher's. The tensors are the folder's, of the fp16 variant where it has one. The file
    appears whole and verified or not at all. Raises `Refused` for a folder that is no velocity model of ours, for a
    tensor that no SD-1.x model has, for a file that breaks a law of `checks`, and for a full disk.
    """
    held = open_export(folder, unet_only)
    file = folder.parent / single_file_name(held.facts, name, unet_only)
    tensors = held.ldm_tensors()
    told = tensorfile.with_header_hash(
        single_file_metadata(held.facts, held.picture_pixels, tensorfile.hash_tensors(tensors), name, unet_only)
    )
    refuse_foreign_file(file)
    refuse_foreign_file(folder.parent / WORKFLOW_FILE)
    with atomic_path(file) as temporary:
        readable = temporary.with_suffix(".safetensors")  # stock diffusers goes by the ending
        try:
            tensorfile.write(readable, tensors, told)
            verify_single_file(readable, held, told, file.name)
            readable.replace(temporary)
        finally:
            readable.unlink(missing_ok=True)
    graph = workflow_json(
        file.name, held.facts["flow_shift"], held.picture_pixels, _base_checkpoint(held) if unet_only else None
    )
    atomic_write(folder.parent / WORKFLOW_FILE, graph)
    return file


def verify_single_file(file: Path, folder: ExportFolder, header: Mapping[str, str], display_name: str) -> None:
    """Raise `Refused` unless the file holds the folder's tensors, says `told`, and stock diffusers reads it so.

    `name` is what the file is called in messages: it is verified before it gets its name.
    """
    found, meant = read_tensors(file), folder.ldm_tensors()
    checks.check_names_and_shapes(display_name, found, meant)
    checks.check_dtype(display_name, found, folder.dtype)
    checks.check_finite(display_name, found)
    checks.check_equal(display_name, found, meant)
    for key, ldm in folder.ldm_names.items():
        if not _round_trips(key, found[ldm], folder.tensors[key]):
            raise Refused(
                f"{display_name}: {ldm} is not {key} again on the way back to diffusers - {checks.EXPORT_REMEDY}"
            )
    with safe_open(file, "pt") as opened:
        said = opened.metadata()
    if said != header or tensorfile.hash_file_tensors(file) != header["modelspec.hash_sha256"]:
        raise Refused(f"{display_name}: its header did not come back as written - {checks.EXPORT_REMEDY}")
    verify_in_stock_diffusers(file, display_name, folder.path, folder.variant, folder.tensors, folder.unet_only)


def refuse_other_predictions(prediction: str) -> None:
    """The programs that read this layout can be told of velocity alone."""
    if prediction != "velocity":
        raise Refused(
            f"export: the student answers with {prediction}, and a single -flow file says velocity - "
            "leave it out with --single-file false"
        )


def open_export(folder: Path, unet_only: bool = False) -> ExportFolder:
    """Read the folder, whole or its network alone; raises `Refused` when it is not a velocity model of ours."""
    if not (folder / FACTS_FILE).is_file():
        raise Refused(f"{folder}: no export of ours ({FACTS_FILE} is missing) - name the diffusers folder of an export")
    facts = read_facts(folder)
    refuse_other_predictions(facts["prediction"])
    check_sd1_architecture(folder)
    unet, vae = (read_json(folder / part / "config.json") for part in ("unet", "vae"))
    variant = HALF_VARIANT if HALF_VARIANT in facts.get("variants", ()) else ""
    dtype = torch.float16 if variant else getattr(torch, facts["dtype"])
    tensors = {
        f"{part}.{name}": value
        for part in (["unet"] if unet_only else WEIGHT_STEMS)
        for name, value in read_tensors(folder / weight_file(part, variant)).items()
    }
    checks.check_dtype(str(folder), tensors, dtype)
    checks.check_finite(str(folder), tensors)
    levels = len(vae["block_out_channels"])
    names = ldm_names(tensors, unet["layers_per_block"], levels)
    return ExportFolder(
        folder, facts, variant, dtype, tensors, names, unet["sample_size"] * 2 ** (levels - 1), unet_only
    )


def _round_trips(key: str, value: Tensor, expected: Tensor) -> bool:
    """Whether a tensor of the file is the folder's on the way to diffusers, and itself again on the way back."""
    back = to_diffusers(key, value)
    same = back.dtype == expected.dtype and torch.equal(back, expected)
    return same and value.shape == to_ldm(key, back).shape and torch.equal(to_ldm(key, back), value)


def _base_checkpoint(folder: ExportFolder) -> str:
    """The checkpoint that lends text encoder and VAE to a network alone: the teacher's, by its usual name."""
    return f"{teacher_name(folder.facts)}.safetensors"
