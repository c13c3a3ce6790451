"""An exported diffusers folder as one file in the LDM layout, for ComfyUI, SwarmUI, SD.Next and their kind."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from configs.values import PictureSize
from stages.export import checks, tensorfile
from stages.export.comfyui import WORKFLOW_FILE, workflow_json
from stages.export.folder import FACTS_FILE, learnt_sizes, read_facts, read_header, refuse_foreign_file
from stages.export.folds import fold_tensors
from stages.export.tensorfile import single_file_metadata, single_file_name, teacher_name
from stages.export.verify_export import HALF_VARIANT, SKIPPED_LAYERS_FILE, WEIGHT_STEMS, read_tensors, weight_file
from stages.nets.latents import LatentGeometry
from stages.sampling.few_steps import FewSteps, check_few_steps, few_steps_of
from stages.system.atomic import atomic_path, atomic_write
from stages.system.refusal import Refused
from stages.teacher_files.architecture import check_sd1_architecture
from stages.teacher_files.folder import read_json
from stages.teacher_files.ldm_names import ldm_names, to_diffusers, to_ldm

STEPS, GUIDANCE = 2, 3.0


@dataclass(frozen=True)
class ExportFolder:
    """The content of an exported diffusers folder that a single file takes over."""

    path: Path
    facts: Mapping[str, Any]
    """Its `sollune.json`."""
    variant: str
    """Which of its files are taken over; the plain ones' variant is the empty word."""
    dtype: torch.dtype
    tensors: Mapping[str, Tensor]
    """`<component>.<diffusers' name>` -> tensor, all of one type."""
    ldm_names: Mapping[str, str]
    """The same names -> names in the LDM layout."""
    native_size: PictureSize
    """The size of the pictures for which the teacher was made."""
    unet_only: bool
    few_steps: FewSteps | None = None
    fold: float | None = None
    """The guidance scale that is folded into the tensors of a student of few steps."""

    @property
    def sizes(self) -> tuple[PictureSize, ...]:
        """The picture sizes that the student learnt, the most frequent first."""
        return learnt_sizes(self.path, self.facts) or (self.native_size,)

    def ldm_tensors(self) -> dict[str, Tensor]:
        """The tensors as one file holds them."""
        return {self.ldm_names[key]: to_ldm(key, value) for key, value in self.tensors.items()}

    def metadata(self, name: str | None) -> dict[str, str]:
        """The metadata of the file."""
        digest = tensorfile.hash_tensors(self.ldm_tensors())
        # Programs take it for the model's standard size, whose area they keep at other aspects.
        resolution = self.native_size if self.native_size in self.sizes else self.sizes[0]
        return tensorfile.with_header_hash(
            single_file_metadata(self.facts, resolution, digest, name, self.unet_only, self.fold)
        )


def export_ldm(
    folder: Path,
    name: str | None = None,
    *,
    unet_only: bool = False,
    fold: float | None = None,
    with_workflow: bool = True,
) -> Path:
    """Write `<name>-flow.safetensors` and a ComfyUI workflow beside an exported diffusers folder; returns the file.

    `fold` is the guidance scale of a student of few steps, which is folded into the weights and stands in the name.

    The default name is the teacher's. The tensors are the folder's, of the fp16 variant where it has one. The file
    appears whole and verified or not at all. Raises `Refused` for a folder that is no velocity model of ours, for a
    tensor that no SD-1.x model has, for a file that fails a check of `checks`, and for a full disk.
    """
    content = open_export(folder, unet_only, fold)
    file, workflow = (
        folder.parent / single_file_name(content.facts, name, unet_only, fold),
        folder.parent / WORKFLOW_FILE,
    )
    header = content.metadata(name)
    refuse_foreign_file(file)
    if with_workflow:
        refuse_foreign_file(workflow)
    with atomic_path(file) as temporary:
        readable = temporary.with_suffix(".safetensors")  # stock diffusers goes by the ending
        try:
            tensorfile.write(readable, content.ldm_tensors(), header)
            verify_single_file(readable, content, header, file.name)
            readable.replace(temporary)
        finally:
            readable.unlink(missing_ok=True)
    if not with_workflow:
        return file
    base_checkpoint = f"{teacher_name(content.facts)}.safetensors" if unet_only else None
    facts = content.facts
    graph = workflow_json(
        file.name,
        facts["flow_shift"],
        content.sizes[0],
        base_checkpoint,
        clip_skip=facts.get("clip_skip", 0),
        windows=content.few_steps and content.few_steps.windows,
    )
    atomic_write(workflow, graph)
    return file


def open_export(folder: Path, unet_only: bool = False, fold: float | None = None) -> ExportFolder:
    """Read the folder, whole or its UNet alone; raises `Refused` when it is not a velocity model of ours.

    With `fold` its UNet is that of one guidance scale.
    """
    facts = read_facts(folder)
    refuse_other_predictions(facts["prediction"])
    few_steps = few_steps_of(facts, str(folder / FACTS_FILE))
    if (few_steps is None) != (fold is None):
        state = "takes a guidance scale" if few_steps else "takes no guidance scale"
        raise Refused(f"{folder}: the student {state}, its single file does not - {checks.EXPORT_REMEDY}")
    check_sd1_architecture(folder, guidance_input=few_steps is not None)
    unet, vae = (read_json(folder / component / "config.json") for component in ("unet", "vae"))
    variant = HALF_VARIANT if HALF_VARIANT in facts.get("variants", ()) else ""
    dtype = torch.float16 if variant else getattr(torch, facts["dtype"])
    tensors = {
        f"{component}.{name}": value
        for component in (["unet"] if unet_only else WEIGHT_STEMS)
        for name, value in read_tensors(folder / weight_file(component, variant)).items()
    }
    if not unet_only:
        tensors |= _skipped_layers(folder, facts, dtype)
    checks.check_values(str(folder), tensors, dtype)
    if fold is not None:
        check_few_steps(str(folder), few_steps, facts["flow_shift"], unet)
        tensors = fold_tensors(tensors, unet, fold, dtype)
    names = ldm_names(tensors, unet["layers_per_block"], len(vae["block_out_channels"]))
    native_size = LatentGeometry.from_configs(unet, vae).native_size
    return ExportFolder(folder, facts, variant, dtype, tensors, names, native_size, unet_only, few_steps, fold)


def _skipped_layers(folder: Path, facts: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """The layers that the folder's text encoder leaves out: programs expect a whole one in a single file."""
    if not facts.get("clip_skip"):
        return {}
    return {
        f"text_encoder.{name}": value.to(dtype) for name, value in read_tensors(folder / SKIPPED_LAYERS_FILE).items()
    }


def refuse_other_predictions(prediction: str) -> None:
    """Raise `Refused` unless the prediction is velocity, the only one that programs read from this layout."""
    if prediction != "velocity":
        raise Refused(
            f"export: the student predicts {prediction}, and a single -flow file is for velocity - "
            "leave it out with --single-file false"
        )


def verify_single_file(file: Path, content: ExportFolder, header: Mapping[str, str], display_name: str) -> None:
    """Raise `Refused` unless the file holds the folder's tensors and this header, and stock diffusers reads it so.

    `display_name` stands for the file in messages: it is verified before it gets its name.
    """
    tensors = read_tensors(file)
    checks.check_values(display_name, tensors, content.dtype)
    checks.check_equal(display_name, tensors, content.ldm_tensors())
    for key, ldm_name in content.ldm_names.items():
        if not _round_trips(key, tensors[ldm_name], content.tensors[key]):
            message = f"{display_name}: {ldm_name} is not {key} again on the way back to diffusers"
            raise Refused(f"{message} - {checks.EXPORT_REMEDY}")
    if read_header(file) != header or tensorfile.hash_file_tensors(file) != header["modelspec.hash_sha256"]:
        raise Refused(f"{display_name}: its header did not come back as written - {checks.EXPORT_REMEDY}")
    _verify_in_stock_diffusers(file, content, display_name)


def _round_trips(key: str, value: Tensor, expected: Tensor) -> bool:
    """Whether a tensor of the file is the folder's in diffusers' layout, and itself again in LDM's."""
    back = to_diffusers(key, value)
    same = back.dtype == expected.dtype and torch.equal(back, expected)
    return same and value.shape == to_ldm(key, back).shape and torch.equal(to_ldm(key, back), value)


def _verify_in_stock_diffusers(file: Path, content: ExportFolder, display_name: str) -> None:
    """`from_single_file` must give the folder's tensors, and sample the folder's latents, without a network.

    One pipeline is held at a time: at SD-1.x's size each takes 4.3 GB.
    """
    steps, guidance = (content.few_steps.windows, content.fold) if content.few_steps else (STEPS, GUIDANCE)
    assert guidance is not None
    expected = sample_latents(_load_pipeline(content), steps, guidance)
    pipeline = _open_single_file(file, content)
    for component in ("unet",) if content.unet_only else WEIGHT_STEMS:
        for key, value in getattr(pipeline, component).state_dict().items():
            stored = content.tensors.get(f"{component}.{key}", content.tensors.get(f"{component}.text_model.{key}"))
            if stored is None or not torch.equal(value, stored.float()):
                message = f"{display_name}: stock diffusers reads another {component}.{key}"
                raise Refused(f"{message} - {checks.EXPORT_REMEDY}")
    found = sample_latents(pipeline, steps, GUIDANCE if content.fold is None else 1.0)
    error = checks.relative_error(found, expected)
    # The folded bias is rounded to the type of the file.
    dtype = torch.float32 if content.fold is None else content.dtype
    most = steps * guidance * checks.rounding_tolerance(len(content.tensors), dtype)
    if not error <= most:
        raise Refused(
            f"{display_name}: stock diffusers samples latents {error:.1e} away from the folder's, rounding explains "
            f"{most:.1e} - {checks.EXPORT_REMEDY}"
        )


def _open_single_file(file: Path, content: ExportFolder) -> StableDiffusionPipeline:
    options: dict[str, Any] = {"config": str(content.path), "local_files_only": True}
    if not content.unet_only and content.fold is None:
        return StableDiffusionPipeline.from_single_file(file, **options)
    plain = {} if content.fold is None else {"time_cond_proj_dim": None}
    unet = UNet2DConditionModel.from_single_file(file, subfolder="unet", **options, **plain)
    if content.unet_only:
        return _load_pipeline(content, unet=unet)
    return StableDiffusionPipeline.from_single_file(file, unet=unet, **options)


def _load_pipeline(content: ExportFolder, **components: UNet2DConditionModel) -> StableDiffusionPipeline:
    """In fp32, which every processor can compute in, as single files are opened by default."""
    variant = content.variant or None
    return StableDiffusionPipeline.from_pretrained(content.path, variant=variant, dtype=torch.float32, **components)


def sample_latents(pipeline: StableDiffusionPipeline, steps: int = STEPS, guidance: float = GUIDANCE) -> Tensor:
    """Small latents after a few steps from the same noise, [1, c, 8, 8]."""
    pipeline.set_progress_bar_config(disable=True)
    side, channels = checks.PROBE_LATENT_SIDE, pipeline.unet.config.in_channels
    pixels = side * pipeline.vae_scale_factor
    latents: Tensor = pipeline(
        "a red star",
        height=pixels,
        width=pixels,
        num_inference_steps=steps,
        guidance_scale=guidance,
        latents=torch.randn(1, channels, side, side, generator=torch.Generator().manual_seed(0)),
        output_type="latent",
    ).images
    return latents
