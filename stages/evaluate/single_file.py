"""One .safetensors file in the LDM layout: what it says of itself, and the stock pipeline that it makes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from diffusers.loaders.single_file_utils import SingleFileComponentError
from safetensors import SafetensorError, safe_open
from torch import nn

from configs.refusal import Refused
from stages.nets.anatomy import check_anatomy, check_fit
from stages.nets.files import read_json
from stages.nets.loading import infinite, load_part, load_tokenizer
from stages.nets.student import TIME_SCALE

PARTS = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text_encoder": "cond_stage_model."}
"""Part -> how the names of its tensors begin."""
OTHERS = ("vae", "text_encoder")
"""Parts that a file may leave to the folder: exports hold the UNet alone on request."""
OURS = {"prediction": "velocity", "path": "linear", "time_scale": f"{TIME_SCALE:g}"}
"""What `sollune export` says in a file's metadata, behind `sollune.`, of a model that we can sample."""


@dataclass(frozen=True)
class SingleFile:
    """A file's metadata, and the parts of a model that its tensors belong to."""

    path: Path
    told: Mapping[str, str]
    parts: Mapping[str, int]
    """Part -> how many tensors of it the file holds."""

    @property
    def ours(self) -> bool:
        """Whether `sollune export` wrote it."""
        return "sollune.prediction" in self.told

    def flow_shift(self, configs: Path) -> float | None:
        """The shift of a model that answers with velocity; None for a teacher.

        A file of ours says so itself. Of another only the scheduler of `configs` tells, as in stock diffusers; raises
        `Refused` where the file's own metadata says otherwise.
        """
        if self.ours:
            return self._own_shift()
        scheduler = read_json(configs / "scheduler" / "scheduler_config.json")
        flow, said = scheduler.get("prediction_type") == "flow_prediction", self.told.get("modelspec.prediction_type")
        if flow and said in ("epsilon", "v"):
            raise Refused(
                f"{self.path}: its metadata say prediction {said}, and {configs} is a flow model - "
                "name with --config-from the diffusers folder of the model that this file was made from"
            )
        return shift_of(scheduler, configs) if flow else None

    def _own_shift(self) -> float:
        said = self.told.get("sollune.shift", "nothing")
        try:
            shift = float(said)
            if not 0 < shift < math.inf:
                raise ValueError(said)
            return shift
        except ValueError as error:
            raise Refused(
                f"{self.path}: sollune.shift is {said}, not a number above 0 - export the run again"
            ) from error


def shift_of(scheduler: Mapping[str, Any], folder: Path) -> float:
    """The shift that a folder's scheduler names; raises `Refused` for one that is no shift."""
    said = scheduler.get("flow_shift", 1.0)
    if isinstance(said, bool) or not isinstance(said, int | float) or not 0 < said < math.inf:
        raise Refused(f"{folder}/scheduler: flow_shift is {said!r:.40}, not a number above 0 - fetch the folder again")
    return float(said)


def read_single(path: Path) -> SingleFile:
    """Look into a file without loading it; raises `Refused` for what is no whole SD-1.x model of a known prediction."""
    if path.suffix != ".safetensors":
        raise Refused(f"{path}: not a .safetensors file - other formats may run code when opened, so convert it first")
    try:
        with safe_open(path, "pt") as opened:
            told, names = opened.metadata() or {}, list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise Refused(f"{path}: cannot be read ({error}) - export or fetch it again") from error
    counts = {part: sum(_belongs(name, prefix) for name in names) for part, prefix in PARTS.items()}
    file = SingleFile(path, told, {part: count for part, count in counts.items() if count})
    if "unet" not in file.parts:
        raise Refused(f"{path}: holds no UNet in the LDM layout ({PARTS['unet']}...) - name a whole model's file")
    for key, value in OURS.items():
        if file.ours and told.get(f"sollune.{key}") != value:
            raise Refused(
                f"{path}: sollune.{key} is {told.get(f'sollune.{key}')}, not {value} - sample its run instead"
            )
    return file


def open_single(file: SingleFile, configs: Path, device: torch.device) -> StableDiffusionPipeline:
    """The stock pipeline of the file's weights, in fp32; sizes and words, and the parts it lacks, come from `configs`.

    Raises `Refused` unless every tensor of every part is there, in the size that `configs` say.
    """
    check_anatomy(configs)
    check_fit(configs)
    tokenizer = load_tokenizer(configs)
    try:
        others = {part: load_part(configs, part, torch.float32) for part in OTHERS if part not in file.parts}
        pipeline = StableDiffusionPipeline.from_single_file(
            str(file.path),
            config=str(configs),
            local_files_only=True,
            dtype=torch.float32,
            feature_extractor=None,
            tokenizer=tokenizer,
            **others,
        ).to(device)
    except NotImplementedError as error:  # what torch says of a tensor that nobody filled
        raise Refused(f"{file.path}: lacks tensors that {configs} ask for - export or fetch it again") from error
    except (SingleFileComponentError, OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise Refused(
            f"{file.path}: not of the sizes in {configs} ({reason}) - name its own diffusers folder by --config-from"
        ) from error
    for part in PARTS:
        _refuse_foreign(file, part, getattr(pipeline, part), configs)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _belongs(name: str, prefix: str) -> bool:
    """Whether a tensor is one of a part's own; the original autoencoders' files hold their training's loss as well."""
    return name.startswith(prefix) and not name.startswith("first_stage_model.loss.")


def _refuse_foreign(file: SingleFile, part: str, loaded: nn.Module, configs: Path) -> None:
    """Raise `Refused` for tensors that diffusers left out of a part, and for values that are no numbers."""
    if reason := infinite(loaded):
        raise Refused(f"{file.path}: {part}: {reason} - export or fetch it again")
    # A text encoder's file may hold more than is read of it: position_ids, and what CLIP itself needs.
    left_out = file.parts.get(part, 0) - len(loaded.state_dict())
    if part != "text_encoder" and left_out > 0:
        raise Refused(
            f"{file.path}: holds {left_out} tensors more of the {part} than {configs} know - "
            "name its own diffusers folder by --config-from"
        )
