"""The frozen teacher: sentences -> conditioning, states -> velocities of both branches, latents -> pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stages.flow.bridge import Bridge, Tail
from stages.nets.components import Components
from stages.nets.network import Network, Said, joined, precise, precision_of

FITTING_RATE = 0.02
"""Of latents, whose deviation is about 1."""


@dataclass(frozen=True)
class Answer:
    """What the teacher says about a batch of states; features are those of the conditional branch."""

    v_cond: Float[Tensor, "b c h w"]
    v_uncond: Float[Tensor, "b c h w"]
    features: Mapping[str, Float[Tensor, "b n"]]


class Teacher:
    """A noise- or v-predicting model, seen as a velocity field on the linear path."""

    def __init__(
        self, parts: Components, tail: Tail, dtype: torch.dtype = torch.float32, *, compiled: bool = False
    ) -> None:
        """Of a lower `dtype` a second copy of the UNet is made, which answers wherever that is precise enough."""
        self.parts = parts
        self.bridge = Bridge(parts.schedule, tail)
        self._full = Network(parts.unet, parts.unet.dtype, compiled)
        self._lower = None if dtype == parts.unet.dtype else Network(parts.unet, dtype, compiled)

    @property
    def precision(self) -> str:
        """In what it computes, as a recipe tells it."""
        return precision_of((self._lower or self._full).dtype, self.bridge)

    @cached_property
    def uncond(self) -> Float[Tensor, "1 l d"]:
        """The conditioning of the unconditional branch: the empty sentence."""
        return self.encode([""])

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> Float[Tensor, "b l d"]:
        """The last hidden state of the text encoder for each sentence, padded as the pipeline does."""
        tokens = self.parts.tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt")
        said = self.parts.text_encoder(tokens.input_ids.to(self.parts.text_encoder.device))
        states: Tensor = said.last_hidden_state
        return states

    @torch.inference_mode()
    def answer(
        self,
        x: Float[Tensor, "b c h w"],
        s: Float[Tensor, " b"],
        k: Int[Tensor, " b"],
        cond: Float[Tensor, "b l d"],
        uncond: Float[Tensor, "1 l d"],
    ) -> Answer:
        """Velocities (fp32) at the states (x, s), asked at the teacher's own step k, both branches in one pass."""
        raw = self._ask(self.bridge.teacher_input(x, s), k, cond, uncond)
        v_cond, v_uncond = (self.bridge.velocity(x.float(), s, k, part) for part in (raw.cond, raw.uncond))
        return Answer(v_cond, v_uncond, raw.features)

    def _ask(
        self,
        shown: Float[Tensor, "b c h w"],
        k: Int[Tensor, " b"],
        cond: Float[Tensor, "b l d"],
        uncond: Float[Tensor, "1 l d"],
    ) -> Said:
        """The network's raw answers, each row's in the precision that its step needs."""
        needed = precise(self.bridge, k) if self._lower else torch.ones_like(k, dtype=torch.bool)
        asked = [(self._full, needed.nonzero().flatten())]
        if self._lower:
            asked.append((self._lower, (~needed).nonzero().flatten()))
        rows = [(network, here) for network, here in asked if len(here)]
        if len(rows) == 1:
            return rows[0][0].ask(shown, k, cond, uncond)
        said = [network.ask(shown[here], k[here], cond[here], uncond) for network, here in rows]
        return joined(said, torch.cat([here for _, here in rows]))

    @torch.inference_mode()
    def latents(self, pictures: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        """Scaled latents of pictures in [0, 1]: the mean of what the autoencoder says, so always the same."""
        vae = self.parts.vae
        said = vae.encode(pictures.to(vae.device, vae.dtype) * 2 - 1).latent_dist
        latents: Tensor = said.mean.float() * vae.config["scaling_factor"]
        return latents

    @torch.inference_mode(False)
    @torch.enable_grad()
    def fitted(self, picture: Float[Tensor, "3 H W"], steps: int) -> Float[Tensor, "c h w"]:
        """Scaled latents that the decoder makes a picture in [0, 1] of, sought from those that the encoder makes of it.

        What an encoder has never seen it may not see. Adam moves each latent by about `FITTING_RATE` a step at most, so
        that they stay where a network knows them, down the mean absolute difference of the pixels.
        """
        vae, wanted = self.parts.vae, picture[None].to(self.parts.vae.device, torch.float32)
        latents = self.latents(picture[None]).clone().requires_grad_(True)
        optimizer = torch.optim.Adam([latents], lr=FITTING_RATE)
        for _ in range(steps):
            drawn = vae.decode(latents.to(vae.dtype) / vae.config["scaling_factor"]).sample.float() / 2 + 0.5
            (latents.grad,) = torch.autograd.grad((drawn - wanted).abs().mean(), latents)
            optimizer.step()
        return latents.detach()[0]

    @torch.inference_mode()
    def decode(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        """Pictures in [0, 1]."""
        vae = self.parts.vae
        decoded = vae.decode(latents.to(vae.dtype) / vae.config["scaling_factor"]).sample
        pictures: Tensor = (decoded.float() / 2 + 0.5).clamp(0, 1)
        return pictures
