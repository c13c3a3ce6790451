"""The frozen teacher: sentences -> conditioning, states -> velocities of both branches, pictures <-> latents."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stages.flow.bridge import Bridge, TailPolicy
from stages.nets.components import Components
from stages.nets.features import FeatureTap, copy_without_hooks
from stages.nets.loading import non_finite_reason
from stages.nets.student import Prediction
from stages.system.refusal import Refused

MAX_ERROR_AMPLIFICATION = 4.34
"""The bridge multiplies an error of the network by 1 / (1 - s). Beyond this the 1e-3 of half precision would be up to
1 % of the velocity, so those steps are computed in full: SD-1.x's from k = 701 on, where it is 4.35 to 16."""
LATENT_FIT_LEARNING_RATE = 0.02
"""Of latents, whose standard deviation is about 1."""


def last_low_precision_step(bridge: Bridge) -> int:
    """The last step of a schedule at which a lower precision is precise enough."""
    return int((1 / (1 - bridge.s_table) <= MAX_ERROR_AMPLIFICATION).sum()) - 1


def needs_full_precision(bridge: Bridge, k: Int[Tensor, " b"]) -> Bool[Tensor, " b"]:
    """Which of these steps are computed in the full precision of the weights."""
    return k > last_low_precision_step(bridge)


def precision_text(dtype: torch.dtype, bridge: Bridge) -> str:
    """A precision as a recipe holds it."""
    name = str(dtype).removeprefix("torch.")
    return name if dtype == torch.float32 else f"{name}, float32 above k = {last_low_precision_step(bridge)}"


class FrozenUNet:
    """A teacher's UNet in one precision, which computes both branches of guidance in one pass."""

    def __init__(self, unet: UNet2DConditionModel, bridge: Bridge, dtype: torch.dtype, compiled: bool) -> None:
        """`unet` is copied if it has another dtype, and channels-last on a GPU.

        Raises `Refused` for a weight that is too large for the dtype.
        """
        if unet.dtype != dtype:
            unet = copy_without_hooks(unet).to(dtype).eval().requires_grad_(False)
            if reason := non_finite_reason(unet):
                kind = str(dtype).removeprefix("torch.")
                raise Refused(f"teacher: unet: {reason}: too large for {kind} - set dtype to float32 (--dtype)")
        if unet.device.type == "cuda":
            unet.to(memory_format=torch.channels_last)
        self.bridge, self.dtype, self.feature_tap = bridge, dtype, FeatureTap(unet)
        self._unet: Any = torch.compile(unet) if compiled else unet

    def predict(
        self,
        x: Float[Tensor, "b c h w"],
        s: Float[Tensor, " b"],
        k: Int[Tensor, " b"],
        cond: Float[Tensor, "b l d"],
        uncond: Float[Tensor, "1 l d"],
    ) -> Prediction:
        """Velocities at the states (x, s) from the network's output at step k."""
        both = torch.cat([cond, uncond.expand_as(cond)]).to(self.dtype)
        network_input = self.bridge.teacher_input(x, s).to(self.dtype)
        output = self._unet(network_input.repeat(2, 1, 1, 1), k.repeat(2), both).sample.float()
        v_cond, v_uncond = (self.bridge.velocity(x.float(), s, k, branch) for branch in output.chunk(2))
        return Prediction(v_cond, v_uncond, self.feature_tap.pop_features(slice(0, len(x))))


class Teacher:
    """A noise- or v-predicting model as a velocity field on the linear path."""

    def __init__(
        self, components: Components, tail: TailPolicy, dtype: torch.dtype = torch.float32, *, compiled: bool = False
    ) -> None:
        """With a lower `dtype` a second copy of the UNet computes the steps at which that is precise enough."""
        self.components, own_dtype = components, components.unet.dtype
        self.bridge = Bridge(components.schedule, tail)
        self._full_precision = FrozenUNet(components.unet, self.bridge, own_dtype, compiled)
        self._low_precision = None if dtype == own_dtype else FrozenUNet(components.unet, self.bridge, dtype, compiled)

    @property
    def precision(self) -> str:
        """The precision in which it computes, as a recipe holds it."""
        return precision_text((self._low_precision or self._full_precision).dtype, self.bridge)

    @cached_property
    def uncond(self) -> Float[Tensor, "1 l d"]:
        """The conditioning of the unconditional branch: the empty sentence."""
        return self.encode_texts([""])

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str]) -> Float[Tensor, "b l d"]:
        """The last hidden state of the text encoder for each sentence, padded as the pipeline does."""
        encoder = self.components.text_encoder
        tokens = self.components.tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt")
        states: Tensor = encoder(tokens.input_ids.to(encoder.device)).last_hidden_state
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
        """Velocities at the states (x, s) from the teacher's own step k, each row in the precision that k needs."""
        if self._low_precision is None:
            return self._full_precision.predict(x, s, k, cond, uncond)
        full = needs_full_precision(self.bridge, k)
        parts = [(self._full_precision, full.nonzero()[:, 0]), (self._low_precision, (~full).nonzero()[:, 0])]
        parts = [(network, rows) for network, rows in parts if len(rows)]
        predictions = [network.predict(x[rows], s[rows], k[rows], cond[rows], uncond) for network, rows in parts]
        return _in_batch_order(predictions, torch.cat([rows for _, rows in parts]))

    @torch.inference_mode()
    def encode_pictures(self, pictures: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        """Scaled latents of pictures in [0, 1]: the mean of the autoencoder's distribution, so deterministic."""
        vae = self.components.vae
        distribution = vae.encode(pictures.to(vae.device, vae.dtype) * 2 - 1).latent_dist
        latents: Tensor = distribution.mean.float() * vae.config["scaling_factor"]
        return latents

    @torch.inference_mode(False)
    @torch.enable_grad()
    def fit_latents(self, picture: Float[Tensor, "3 H W"], steps: int) -> Float[Tensor, "c h w"]:
        """Scaled latents that decode to a picture in [0, 1], fitted from the encoder's.

        An encoder may be blind to what it was not trained on. Adam minimises the mean absolute difference of the pixels
        and moves each latent by about `LATENT_FIT_LEARNING_RATE` a step at most, so that they stay typical latents.
        """
        target = picture[None].to(self.components.vae.device, torch.float32)
        latents = self.encode_pictures(picture[None]).clone().requires_grad_(True)
        optimizer = torch.optim.Adam([latents], lr=LATENT_FIT_LEARNING_RATE)
        for _ in range(steps):
            (latents.grad,) = torch.autograd.grad((self._decode(latents) - target).abs().mean(), latents)
            optimizer.step()
        return latents.detach()[0]

    @torch.inference_mode()
    def decode_latents(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        """Pictures in [0, 1]."""
        return self._decode(latents).clamp(0, 1)

    def _decode(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        vae = self.components.vae
        pictures: Tensor = vae.decode(latents.to(vae.dtype) / vae.config["scaling_factor"]).sample.float() / 2 + 0.5
        return pictures


def _in_batch_order(parts: Sequence[Prediction], rows: Int[Tensor, " b"]) -> Prediction:
    """The joined predictions of several networks; row i of the parts is row `rows[i]` of the batch."""
    order = rows.argsort()

    def join(tensors: list[Tensor]) -> Tensor:
        return torch.cat(tensors)[order]

    features = {block: join([part.features[block] for part in parts]) for block in parts[0].features}
    return Prediction(join([part.v_cond for part in parts]), join([part.v_uncond for part in parts]), features)
