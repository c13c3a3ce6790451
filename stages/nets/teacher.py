"""A teacher's UNet in one precision, asked for both branches of guidance in one pass.

The frozen teacher: sentences -> conditioning, states -> velocities of both branches, latents -> pictures.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stages.flow.bridge import Bridge, TailPolicy
from stages.nets.components import Components
from stages.nets.features import FeatureTap, copy_without_hooks
from stages.system.refusal import Refused

MAX_ERROR_AMPLIFICATION = 4.34
"""The bridge multiplies an error of the network by 1 / (1 - s). Beyond this the 1e-3 of half precision would be up to
1 % of the velocity, so those steps are asked in full: SD-1.x's from k = 701 on, where it is 4.35 to 16."""


def needs_full_precision(bridge: Bridge, k: Int[Tensor, " b"]) -> Bool[Tensor, " b"]:
    """Which of these steps are asked in the full precision of the weights."""
    return k > last_low_precision_step(bridge)


def last_low_precision_step(bridge: Bridge) -> int:
    """The last step of a schedule at which a lower precision is precise enough."""
    return int((1 / (1 - bridge.s_table) <= MAX_ERROR_AMPLIFICATION).sum()) - 1


def precision_text(dtype: torch.dtype, bridge: Bridge) -> str:
    """A precision as a recipe tells it."""
    name = str(dtype).removeprefix("torch.")
    return name if dtype == torch.float32 else f"{name}, float32 above k = {last_low_precision_step(bridge)}"


@dataclass(frozen=True)
class NetworkOutput:
    """Raw answers of both branches in fp32, and the pooled features of the conditional one."""

    output_cond: Float[Tensor, "b c h w"]
    output_uncond: Float[Tensor, "b c h w"]
    features: Mapping[str, Float[Tensor, "b n"]]


class FrozenUNet:
    """A frozen UNet that listens to its own blocks."""

    def __init__(self, unet: UNet2DConditionModel, dtype: torch.dtype, compiled: bool) -> None:
        """A copy is made where `unet` is of another dtype; on a GPU it is laid out for its convolutions."""
        self.unet = unet if unet.dtype == dtype else _copy_in_dtype(unet, dtype)
        self.dtype = dtype
        if self.unet.device.type == "cuda":
            self.unet.to(memory_format=torch.channels_last)
        self.feature_tap = FeatureTap(self.unet)
        self._call: Any = torch.compile(self.unet) if compiled else self.unet

    def predict(
        self,
        network_input: Float[Tensor, "b c h w"],
        k: Int[Tensor, " b"],
        cond: Float[Tensor, "b l d"],
        uncond: Float[Tensor, "1 l d"],
    ) -> NetworkOutput:
        """What it answers when it is shown these states at these steps."""
        both = torch.cat([cond, uncond.expand_as(cond)]).to(self.dtype)
        raw = self._call(network_input.to(self.dtype).repeat(2, 1, 1, 1), k.repeat(2), both).sample.float()
        said_cond, said_uncond = raw.chunk(2)
        return NetworkOutput(said_cond, said_uncond, self.feature_tap.pop_features(slice(0, len(network_input))))


def _copy_in_dtype(unet: UNet2DConditionModel, dtype: torch.dtype) -> UNet2DConditionModel:
    """A copy in another precision; raises `Refused` for a weight that is too large for it."""
    lower = copy_without_hooks(unet).to(dtype).eval().requires_grad_(False)
    for name, value in lower.state_dict().items():
        if not bool(value.isfinite().all()):
            kind = str(dtype).removeprefix("torch.")
            raise Refused(f"teacher: unet: tensor {name} is too large for {kind} - set dtype to float32 (--dtype)")
    return lower


def merge_outputs(outputs: Sequence[NetworkOutput], rows: Int[Tensor, " b"]) -> NetworkOutput:
    """The answers of several networks, back in the order of the batch: row i of all parts is row `rows[i]` of it."""
    back = rows.argsort()

    def one(values: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(values))[back]

    features = {block: one([part.features[block] for part in outputs]) for block in outputs[0].features}
    return NetworkOutput(
        one([part.output_cond for part in outputs]), one([part.output_uncond for part in outputs]), features
    )


LATENT_FIT_LEARNING_RATE = 0.02
"""Of latents, whose deviation is about 1."""


@dataclass(frozen=True)
class Prediction:
    """What the teacher says about a batch of states; features are those of the conditional branch."""

    v_cond: Float[Tensor, "b c h w"]
    v_uncond: Float[Tensor, "b c h w"]
    features: Mapping[str, Float[Tensor, "b n"]]


class Teacher:
    """A noise- or v-predicting model, seen as a velocity field on the linear path."""

    def __init__(
        self, components: Components, tail: TailPolicy, dtype: torch.dtype = torch.float32, *, compiled: bool = False
    ) -> None:
        """Of a lower `dtype` a second copy of the UNet is made, which answers wherever that is precise enough."""
        self.components = components
        self.bridge = Bridge(components.schedule, tail)
        self._full_precision = FrozenUNet(components.unet, components.unet.dtype, compiled)
        self._low_precision = None if dtype == components.unet.dtype else FrozenUNet(components.unet, dtype, compiled)

    @property
    def precision(self) -> str:
        """In what it computes, as a recipe tells it."""
        return precision_text((self._low_precision or self._full_precision).dtype, self.bridge)

    @cached_property
    def uncond(self) -> Float[Tensor, "1 l d"]:
        """The conditioning of the unconditional branch: the empty sentence."""
        return self.encode_texts([""])

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str]) -> Float[Tensor, "b l d"]:
        """The last hidden state of the text encoder for each sentence, padded as the pipeline does."""
        tokens = self.components.tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt")
        said = self.components.text_encoder(tokens.input_ids.to(self.components.text_encoder.device))
        states: Tensor = said.last_hidden_state
        return states

    @torch.inference_mode()
    def predict(
        self,
        x: Float[Tensor, "b c h w"],
        s: Float[Tensor, " b"],
        k: Int[Tensor, " b"],
        cond: Float[Tensor, "b l d"],
        uncond: Float[Tensor, "1 l d"],
    ) -> Prediction:
        """Velocities (fp32) at the states (x, s), asked at the teacher's own step k, both branches in one pass."""
        raw = self._network_output(self.bridge.teacher_input(x, s), k, cond, uncond)
        v_cond, v_uncond = (
            self.bridge.velocity(x.float(), s, k, part) for part in (raw.output_cond, raw.output_uncond)
        )
        return Prediction(v_cond, v_uncond, raw.features)

    def _network_output(
        self,
        network_input: Float[Tensor, "b c h w"],
        k: Int[Tensor, " b"],
        cond: Float[Tensor, "b l d"],
        uncond: Float[Tensor, "1 l d"],
    ) -> NetworkOutput:
        """The network's raw answers, each row's in the precision that its step needs."""
        needed = needs_full_precision(self.bridge, k) if self._low_precision else torch.ones_like(k, dtype=torch.bool)
        asked = [(self._full_precision, needed.nonzero().flatten())]
        if self._low_precision:
            asked.append((self._low_precision, (~needed).nonzero().flatten()))
        rows = [(network, here) for network, here in asked if len(here)]
        if len(rows) == 1:
            return rows[0][0].predict(network_input, k, cond, uncond)
        said = [network.predict(network_input[here], k[here], cond[here], uncond) for network, here in rows]
        return merge_outputs(said, torch.cat([here for _, here in rows]))

    @torch.inference_mode()
    def encode_pictures(self, pictures: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        """Scaled latents of pictures in [0, 1]: the mean of what the autoencoder says, so always the same."""
        vae = self.components.vae
        said = vae.encode(pictures.to(vae.device, vae.dtype) * 2 - 1).latent_dist
        latents: Tensor = said.mean.float() * vae.config["scaling_factor"]
        return latents

    @torch.inference_mode(False)
    @torch.enable_grad()
    def fit_latents(self, picture: Float[Tensor, "3 H W"], steps: int) -> Float[Tensor, "c h w"]:
        """Scaled latents that the decoder makes a picture in [0, 1] of, sought from those that the encoder makes of it.

        What an encoder has never seen it may not see. Adam moves each latent by about `FITTING_RATE` a step at most, so
        that they stay where a network knows them, down the mean absolute difference of the pixels.
        """
        vae, wanted = self.components.vae, picture[None].to(self.components.vae.device, torch.float32)
        latents = self.encode_pictures(picture[None]).clone().requires_grad_(True)
        optimizer = torch.optim.Adam([latents], lr=LATENT_FIT_LEARNING_RATE)
        for _ in range(steps):
            drawn = vae.decode(latents.to(vae.dtype) / vae.config["scaling_factor"]).sample.float() / 2 + 0.5
            (latents.grad,) = torch.autograd.grad((drawn - wanted).abs().mean(), latents)
            optimizer.step()
        return latents.detach()[0]

    @torch.inference_mode()
    def decode_latents(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        """Pictures in [0, 1]."""
        vae = self.components.vae
        decoded = vae.decode(latents.to(vae.dtype) / vae.config["scaling_factor"]).sample
        pictures: Tensor = (decoded.float() / 2 + 0.5).clamp(0, 1)
        return pictures
