"""The frozen teacher: sentences -> conditioning, states -> velocities of both branches, latents -> pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stages.flow.bridge import Bridge, Tail
from stages.nets.components import Components
from stages.nets.features import FeatureTap


@dataclass(frozen=True)
class Answer:
    """What the teacher says about a batch of states; features are those of the conditional branch."""

    v_cond: Float[Tensor, "b c h w"]
    v_uncond: Float[Tensor, "b c h w"]
    features: Mapping[str, Float[Tensor, "b n"]]


class Teacher:
    """A noise- or v-predicting model, seen as a velocity field on the linear path."""

    def __init__(self, parts: Components, tail: Tail) -> None:
        self.parts = parts
        self.bridge = Bridge(parts.schedule, tail)
        self.tap = FeatureTap(parts.unet)

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
        unet, b = self.parts.unet, len(x)
        shown = self.bridge.teacher_input(x, s).to(unet.dtype)
        both = torch.cat([cond, uncond.expand_as(cond)]).to(unet.dtype)
        raw = unet(shown.repeat(2, 1, 1, 1), k.repeat(2), both).sample.float()
        v_cond, v_uncond = (self.bridge.velocity(x.float(), s, k, part) for part in raw.chunk(2))
        return Answer(v_cond, v_uncond, self.tap.take(slice(0, b)))

    @torch.inference_mode()
    def decode(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        """Pictures in [0, 1]."""
        vae = self.parts.vae
        decoded = vae.decode(latents.to(vae.dtype) / vae.config["scaling_factor"]).sample
        pictures: Tensor = (decoded.float() / 2 + 0.5).clamp(0, 1)
        return pictures
