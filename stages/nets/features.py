"""What each of the nine blocks says: the output of its last resnet, averaged over the picture."""

from collections.abc import Mapping

import torch
from diffusers import UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor, nn

HOOK_POINT = "last resnet of each block, spatial mean, fp32"


def last_resnets(unet: UNet2DConditionModel) -> dict[str, nn.Module]:
    """Block name -> its last resnet, in the order in which they run."""
    found = {f"down_{i}": block.resnets[-1] for i, block in enumerate(unet.down_blocks)}
    found["mid"] = unet.mid_block.resnets[-1]
    return found | {f"up_{i}": block.resnets[-1] for i, block in enumerate(unet.up_blocks)}


def feature_widths(unet: UNet2DConditionModel) -> dict[str, int]:
    """Block name -> number of channels of its pooled feature."""
    return {name: len(resnet.get_parameter("conv2.weight")) for name, resnet in last_resnets(unet).items()}


def copy_without_hooks(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A copy in fp32 on the same device, to which nobody listens yet."""
    clean = UNet2DConditionModel.from_config(unet.config)
    clean.load_state_dict(unet.state_dict())
    return clean.float().to(unet.device)


class FeatureTap:
    """Listens to the last resnets of a UNet; `take` hands over what the latest forward pass left.

    It listens from the begin of a pass until that is taken: with gradient checkpointing the resnets run once more in
    the backward pass, and what they say then would only keep their activations.
    """

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self._features: dict[str, Tensor] = {}
        self._recording = False
        unet.register_forward_pre_hook(self._start_recording)
        for name, resnet in last_resnets(unet).items():
            resnet.register_forward_hook(self._make_hook(name))

    def _start_recording(self, _unet: nn.Module, _inputs: tuple[Tensor, ...]) -> None:
        self._recording = True

    def _make_hook(self, name: str):  # type: ignore[no-untyped-def]
        def keep(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Float[Tensor, "b n h w"]) -> None:
            if self._recording:
                self._features[name] = output.mean(dim=(2, 3), dtype=torch.float32)

        return keep

    def pop_features(self, rows: slice) -> Mapping[str, Float[Tensor, "b n"]]:
        """Pooled features of these rows of the latest forward pass, in fp32; the tap is empty afterwards."""
        taken, self._features, self._recording = self._features, {}, False
        return {name: feature[rows] for name, feature in taken.items()}
