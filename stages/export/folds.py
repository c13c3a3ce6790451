"""The guidance scales for which a student of few steps gets single files, whose layout has no input for one."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from stages.export.tensorfile import scale_text
from stages.export.verify_export import ExportOptions
from stages.nets.guidance import fold_guidance
from stages.sampling.few_steps import FewSteps
from stages.system.refusal import Refused

UNET_PREFIX = "unet."


def folds_of(options: ExportOptions, few_steps: FewSteps | None) -> tuple[float | None, ...]:
    """The guidance scale of each single file; one None for a student that is guided by two branches.

    Raises `Refused` for options that the student excludes.
    """
    if few_steps is None:
        if options.fold:
            raise Refused(
                f"export: --fold {scale_text(options.fold[0])}: this student takes no guidance scale, which is for "
                "those of distill --windows - leave it out"
            )
        return (None,)
    low, high = few_steps.guidance_range
    if options.flow_shift != 1:
        raise Refused(
            f"export: --flow-shift {options.flow_shift:g}: the {few_steps.windows} windows of this student end at "
            "times of shift 1 - leave it out"
        )
    if options.fold and options.single_file is False:
        raise Refused("export: --fold is for single files, which --single-file false leaves out - choose one")
    for scale in options.fold:
        if not low <= scale <= high:
            raise Refused(
                f"export: --fold {scale_text(scale)}: the student learnt guidance {low:g} to {high:g} - "
                "choose one of these"
            )
        if options.fold.count(scale) > 1:
            raise Refused(f"export: --fold {scale_text(scale)}: stands there more than once - name each scale once")
    return options.fold or (few_steps.default_guidance,)


def fold_tensors(
    tensors: Mapping[str, Tensor], unet_config: Mapping[str, Any], scale: float, dtype: torch.dtype
) -> dict[str, Tensor]:
    """`<component>.<name>` -> tensor of a folder, with the UNet's guidance scale folded in; computed in fp32."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(unet_config)
    stored = {name: value for name, value in tensors.items() if name.startswith(UNET_PREFIX)}
    unet.load_state_dict({name.removeprefix(UNET_PREFIX): value.float() for name, value in stored.items()}, assign=True)
    folded = fold_guidance(unet, scale).state_dict()
    others = {name: value for name, value in tensors.items() if name not in stored}
    return others | {f"{UNET_PREFIX}{name}": value.to(dtype).contiguous() for name, value in folded.items()}
