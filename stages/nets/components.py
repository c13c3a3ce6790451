"""The parts of a Stable Diffusion 1.x model, loaded from a diffusers folder or hub id and checked before use."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from configs.values import PictureSize
from stages.flow.schedule import NoiseSchedule
from stages.nets.latents import LatentGeometry
from stages.nets.loading import call_library, load_component, load_tokenizer
from stages.nets.tokens import PROBE_SENTENCE
from stages.teacher_files.architecture import check_component_match, check_sd1_architecture
from stages.teacher_files.folder import broken_model, read_json
from stages.teacher_files.hub import HubId
from stages.teacher_files.open import TeacherFolder, open_teacher_files
from stages.teacher_files.source import TeacherSource
from stages.teacher_files.variants import WEIGHT_FILES

PROBE_SIDE = 8
"""Height and width of the probe latents: the smallest that the four levels halve three times."""


@dataclass(frozen=True)
class Components:
    """The parts of one teacher, on one device."""

    location: str
    """The folder or hub id that the user named."""
    folder: Path
    """Where its files lie on this machine."""
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    schedule: NoiseSchedule
    files: TeacherFolder | None = None
    """What it was opened from; None for a pipeline."""

    @classmethod
    def from_pipeline(cls, pipeline: StableDiffusionPipeline, location: str, folder: Path) -> "Components":
        """The frozen parts of a pipeline whose configs lie in `folder`."""
        parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
        for part in parts:
            part.eval().requires_grad_(False)
        return cls(location, folder, *parts, pipeline.tokenizer, read_schedule(folder))

    @property
    def name_facts(self) -> dict[str, str]:
        """How an export names its teacher: a hub id in full, of a local path only the last part."""
        place = Path(self.location)
        if place.is_file():
            return {"teacher": place.stem}
        return {"teacher" if place.is_dir() else "base_model": _shown_place(self.location)}

    @property
    def change_facts(self) -> dict[str, Any]:
        """What an export states of the teacher: its identity and what was put into it, by names and not by places."""
        if self.files is None:
            return {}
        source, hashes = self.files.source, [(file.role, file.sha256) for file in self.files.sources]
        facts: dict[str, Any] = {"teacher_sha256": dict(self.files.digests)}
        if source.mix:
            facts["mix"] = [
                {"name": _shown_place(one.model), "weight": one.weight, "sha256": _mix_sha256(hashes, number)}
                for number, one in enumerate(source.mix, start=1)
            ]
        if source.loras:
            sha256 = [value for role, value in hashes if role == "lora"]
            facts["loras"] = [
                {"name": Path(lora.file).name, "scale": lora.scale, "sha256": value}
                for lora, value in zip(source.loras, sha256, strict=True)
            ]
        for role, location in (("vae", source.vae), ("parts", source.parts_from)):
            if location is not None:
                sha256 = [value for known, value in hashes if known == role]
                facts[role] = {"name": _shown_place(location), **({"sha256": sha256[0]} if len(sha256) == 1 else {})}
        return facts

    @property
    def latents(self) -> LatentGeometry:
        """The latents of each picture size, and which sizes are valid."""
        return LatentGeometry.from_configs(self.unet.config, self.vae.config)

    @property
    def native_size(self) -> PictureSize:
        """The size of the pictures that the model was made for."""
        return self.latents.native_size

    def present_folder(self) -> Path:
        """`folder`, made again where it was composed and then deleted, as it may be while a run goes on."""
        return self.files.present_folder() if self.files else self.folder

    def latent_shape(self, size: PictureSize | None = None) -> tuple[int, int, int]:
        """Channels, height and width of a latent of a valid size; of the native one by default."""
        return self.latents.latent_shape(size)

    def check_size(self, size: PictureSize, option: str) -> PictureSize:
        """The size; raises `Refused` naming the option and the nearest valid sizes where the model has none such."""
        return self.latents.check_size(size, option)


def open_teacher(source: TeacherSource | str) -> TeacherFolder:
    """The files of a teacher, and on standard output what the user should know of them."""
    files = open_teacher_files(TeacherSource(location=source) if isinstance(source, str) else source)
    for note in files.notes:
        print(note, flush=True)
    return files


def load_components(
    source: TeacherSource | TeacherFolder | str, device: torch.device, dtype: torch.dtype, *, pruned: bool = False
) -> Components:
    """Load and freeze every part of a teacher, whose files are opened unless they are open already.

    With `pruned` it may be a student without some of the layers. Raises `Refused` for a missing folder, another
    architecture, and an incomplete or unusable part.
    """
    files = source if isinstance(source, TeacherFolder) else open_teacher(source)
    location, folder = files.location, files.folder
    check_sd1_architecture(folder, pruned=pruned)
    schedule = read_schedule(folder)
    check_component_match(folder)
    tokenizer = load_tokenizer(folder)
    unet, vae, text_encoder = (load_component(folder, part, dtype) for part in WEIGHT_FILES)
    components = Components(location, folder, unet, vae, text_encoder, tokenizer, schedule, files)
    _check_forward_passes(components)
    for part in (unet, vae, text_encoder):
        part.to(device)
    return components


def _mix_sha256(hashes: Sequence[tuple[str, str]], number: int) -> Any:
    """sha256 of the file of one model of a mix, or of the files of each of its parts."""
    by_part: dict[str, list[str]] = {}
    for role, sha256 in hashes:
        if (words := role.split(" "))[:2] == ["mix", str(number)]:
            by_part.setdefault(words[-1] if len(words) > 2 else "", []).append(sha256)
    single = {part: values[0] if len(values) == 1 else values for part, values in by_part.items()}
    return single.get("", single)


def _shown_place(location: str) -> str:
    """The name of a hub repository in full, of a local path only the last part."""
    hub_id = None if Path(location).exists() else HubId.parse(location)
    return hub_id.repository if hub_id else Path(location).resolve().name


def read_schedule(folder: Path) -> NoiseSchedule:
    """The schedule of a diffusers folder."""
    return NoiseSchedule.from_config(read_json(folder / "scheduler" / "scheduler_config.json"))


@torch.inference_mode()
def _check_forward_passes(components: Components) -> None:
    """Raise `Refused` for a part whose forward pass fails or is not finite.

    Libraries look at many entries of a config only when they compute, and finite weights may be too large for that.
    """
    unet, vae, text_encoder = components.unet, components.vae, components.text_encoder
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, unet.config["in_channels"], PROBE_SIDE, PROBE_SIDE, generator=generator).to(unet.dtype)
    last_step = torch.tensor([components.schedule.steps - 1])

    def encode_texts() -> Any:
        texts = ["", PROBE_SENTENCE]
        tokens = components.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        return text_encoder(tokens.input_ids).last_hidden_state

    def reconstruct() -> Any:
        return vae.encode(vae.decode(noise / vae.config["scaling_factor"]).sample).latent_dist.mean

    cond = _checked_output(components.folder / "text_encoder", encode_texts)
    _checked_output(components.folder / "unet", lambda: unet(noise, last_step, cond[:1]).sample, noise.shape)
    _checked_output(components.folder / "vae", reconstruct, noise.shape)


def _checked_output(part: Path, compute: Callable[[], Any], shape: torch.Size | None = None) -> Tensor:
    output: Tensor = call_library(f"teacher: {part}", part.parent, compute)
    if shape is not None and output.shape != shape:
        raise broken_model(f"{part}: its output has the shape {list(output.shape)}, latents have {list(shape)}")
    if not bool(output.isfinite().all()):
        raise broken_model(f"{part}: its answer is not finite, so its weights are not those of a model")
    return output
