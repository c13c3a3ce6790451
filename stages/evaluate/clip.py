"""The cosine similarity of pictures and sentences under a CLIP model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor
from transformers import CLIPModel, CLIPProcessor

from stages.nets.loading import incomplete_reason, non_finite_reason
from stages.system.refusal import Refused

CLIP_PATTERNS = ("*.json", "*.txt", "*.safetensors")
HUB_ERRORS = (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError)
LOAD_ERRORS = (*HUB_ERRORS, OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, SafetensorError)
"""What the libraries raise for a folder that is no model, or a broken one."""


class ClipScorer:
    """A `Scorer` of one attribute, the cosine of picture and sentence: 0.15 or so if unrelated, 0.3 if they match."""

    def __init__(self, location: str, device: torch.device) -> None:
        """`location` is a folder or a hub id; raises `Refused` when no CLIP model can be loaded from it."""
        try:
            folder = location
            if not Path(location).is_dir():
                folder = snapshot_download(location, allow_patterns=list(CLIP_PATTERNS))
            loaded: Any = CLIPModel.from_pretrained(
                folder, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
            )
            model, loading_info = loaded
            if reason := incomplete_reason(loading_info) or non_finite_reason(model):
                raise ValueError(reason)  # it would be filled up with random numbers
            self._processor = CLIPProcessor.from_pretrained(folder)
        except LOAD_ERRORS as error:
            reason = " ".join(str(error).split())[:120]
            raise Refused(
                f"clip: {location!r}: no CLIP model can be loaded from there ({reason}) - "
                "name a folder or hub repository that transformers' CLIPModel reads"
            ) from error
        self._model = model.eval().requires_grad_(False).to(device)

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str], pictures: Float[Tensor, "b 3 h w"]) -> Mapping[str, Float[Tensor, " b"]]:
        """The cosine of each pair, in fp32 on the CPU; a sentence longer than the model's context is truncated."""
        inputs = self._processor(
            text=list(texts), images=_images(pictures), return_tensors="pt", padding=True, truncation=True
        )
        output = self._model(**inputs.to(self._model.device))
        cosine: Tensor = (output.image_embeds.float() * output.text_embeds.float()).sum(-1)
        return {"clip": cosine.cpu()}

    @torch.inference_mode()
    def picture_embeddings(self, pictures: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """The embeddings of pictures in the space that they share with sentences, of length 1."""
        inputs = self._processor(images=_images(pictures), return_tensors="pt").to(self._model.device)
        vision = self._model.vision_model(pixel_values=inputs["pixel_values"])
        embeddings: Tensor = self._model.visual_projection(vision.pooler_output).float()
        unit: Tensor = embeddings / embeddings.norm(dim=-1, keepdim=True)
        return unit


def _images(pictures: Float[Tensor, "b 3 h w"]) -> list[Any]:
    """Pictures as the model's processor takes them: bytes, height first, colours last."""
    pixels = (pictures.detach().float().cpu().clamp(0, 1) * 255).round().byte()
    return [picture.permute(1, 2, 0).numpy() for picture in pixels]
