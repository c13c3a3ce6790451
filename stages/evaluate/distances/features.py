"""The space of features in which sets of pictures are compared: a function of one's own, CLIP, or Inception."""

import importlib
import importlib.util
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from configs.values import PictureSize
from stages.evaluate.clip import ClipScorer
from stages.system.refusal import Refused, format_value, in_one_line

Extract: TypeAlias = Callable[[Float[Tensor, "b 3 h w"]], Float[Tensor, "b d"]]
"""Pictures in [0, 1] -> features."""
REMEDY = (
    "name MODULE.FUNCTION of pictures [b 3 h w] in [0, 1] that returns [b d], a folder with a CLIP model, or a "
    "TorchScript file of Inception"
)


@dataclass(frozen=True)
class FeatureSpace:
    """Features by the name that the user gave them."""

    name: str
    extract: Extract

    def __call__(self, pictures: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """The features of pictures in [0, 1], in float64 on the CPU; raises `Refused` for a result that is none."""
        with torch.inference_mode():
            rows: Any = self.extract(pictures)
        if not isinstance(rows, Tensor) or rows.ndim != 2 or len(rows) != len(pictures) or not rows.shape[1]:
            shape = list(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
            raise Refused(f"features: {self.name}: returns {shape} for {len(pictures)} pictures, not [b d] - {REMEDY}")
        if not rows.is_floating_point() or not bool(rows.isfinite().all()):
            raise Refused(f"features: {self.name}: its features are no finite numbers - {REMEDY}")
        return rows.detach().double().cpu()


def open_features(source: str, size: PictureSize, device: torch.device) -> FeatureSpace:
    """The features that a user names, tried on a picture of this size; raises `Refused` where they cannot be used."""
    refuse_missing_torchmetrics()
    path = Path(source).expanduser()
    if path.is_dir():
        space = FeatureSpace(source, ClipScorer(str(path), device).picture_embeddings)
    elif path.is_file():
        space = FeatureSpace(source, _torchscript(path, source, device))
    else:
        space = FeatureSpace(source, _imported(source, device))
    try:
        space(torch.rand(2, 3, size.height, size.width, generator=torch.Generator().manual_seed(0)))
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise Refused(f"features: {source}: fails on pictures of {size} ({in_one_line(error)}) - {REMEDY}") from error
    return space


def refuse_missing_torchmetrics() -> None:
    """Raise `Refused` unless the distances can be computed."""
    if importlib.util.find_spec("torchmetrics") is None:
        raise Refused("features: torchmetrics is not installed - pip install 'sollune[metrics]', or leave features out")


def _imported(source: str, device: torch.device) -> Extract:
    module, _, name = source.rpartition(".")
    try:
        if not module:
            raise ImportError("no such file, folder or module")
        loaded: Any = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise Refused(f"features: {format_value(source)}: cannot be used ({in_one_line(error)}) - {REMEDY}") from error
    if inspect.isclass(loaded) or not callable(loaded):
        raise Refused(f"features: {source}: is no function and no torch module - {REMEDY}")
    if isinstance(loaded, nn.Module):
        return _on_device(loaded.eval(), device)
    extract: Extract = loaded
    return extract


def _on_device(module: Callable[..., Any], device: torch.device) -> Extract:
    def extract(pictures: Tensor) -> Tensor:
        rows: Tensor = module(pictures.to(device))
        return rows

    return extract


def _torchscript(path: Path, source: str, device: torch.device) -> Extract:
    """A TorchScript module of pictures 0 ... 255 (uint8), as Inception was published for StyleGAN.

    That one returns its features where `return_features` is true, and brings pictures to 299 x 299 itself.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", DeprecationWarning
            )  # torch advises against the format, in which Inception is published
            module: Any = torch.jit.load(str(path), map_location=device).eval()
        arguments = {argument.name for argument in module.forward.schema.arguments}
    except (RuntimeError, ValueError, OSError, AttributeError) as error:
        raise Refused(f"features: {source}: is no TorchScript file ({in_one_line(error)}) - {REMEDY}") from error
    options = {"return_features": True} if "return_features" in arguments else {}

    def extract(pictures: Tensor) -> Tensor:
        rows: Tensor = module((pictures.clamp(0, 1) * 255).round().byte().to(device), **options)
        return rows

    return extract
