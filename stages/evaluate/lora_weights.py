"""LoRAs in the weights of loaded models for a while, and whether stock diffusers adds the same to an export."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors import SafetensorError
from torch import Tensor, nn

from stages.nets.components import Components
from stages.nets.loading import quiet_libraries
from stages.sampling.single_file import load_pipeline
from stages.system.refusal import in_one_line
from stages.teacher_files.folder import FETCH_REMEDY
from stages.teacher_files.lora import LoraMerge, open_loras
from stages.teacher_files.parts import SKIPPED_FILE, open_tensor_source
from stages.teacher_files.source import LoraFile

STOCK_TOLERANCE = 1e-5
"""How far stock diffusers may be from our sum, relatively: both add the same in another order."""
ADAPTER = "measured"
STOCK_ERRORS = (
    ImportError, OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, SafetensorError,
)  # fmt: skip
"""What diffusers and peft raise for a file of a naming that they cannot read."""


def open_for(components: Components, lora: LoraFile) -> LoraMerge:
    """The differences of a LoRA file to a loaded teacher's weights, at the file's scale.

    Layers that clip skip leaves out count as there, since the file was made for the whole text encoder. Raises
    `Refused` as `open_loras` does.
    """
    modules: Mapping[str, nn.Module] = {"unet": components.unet, "text_encoder": components.text_encoder}
    shapes = {f"{part}.{name}": tuple(value.shape) for part in modules for name, value in _weights(modules[part])}
    beside = components.folder / "text_encoder" / SKIPPED_FILE
    if beside.is_file():
        skipped = open_tensor_source(beside, f"teacher: {beside}", FETCH_REMEDY).tensors
        shapes |= {f"text_encoder.{name}": value.shape for name, value in skipped.items()}
    return open_loras([lora], shapes, components.unet.config["layers_per_block"])


@contextmanager
def applied(merge: LoraMerge, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """The LoRA in the weights of these modules, by component, within the block; then the very weights of before.

    A component that is not among them stays as it is, and so does a layer that clip skip left out.
    """
    parameters = {f"{part}.{name}": value for part in modules for name, value in _weights(modules[part])}
    own = {key: parameters[key].data for key in merge.pairs if key in parameters}
    try:
        for key, weight in own.items():
            parameters[key].data = merge.merged(key, weight.cpu()).to(weight.device, weight.dtype)
        yield
    finally:
        for key, weight in own.items():
            parameters[key].data = weight


@dataclass(frozen=True)
class StockComparison:
    """Stock `load_lora_weights` on an export against our sum on the same weights, as relative differences."""

    weights: float | None = None
    """The largest |stock - ours| / |ours| of a weight that the LoRA changes; None where diffusers cannot read it."""
    velocity: float | None = None
    """The same of the UNet's outputs."""
    problem: str = ""
    """Why diffusers cannot read it."""

    @property
    def is_equal(self) -> bool:
        """Whether both are within the tolerance."""
        worst = max((value for value in (self.weights, self.velocity) if value is not None), default=torch.inf)
        return worst <= STOCK_TOLERANCE


@torch.inference_mode()
def compare_with_stock(
    folder: Path,
    lora: LoraFile,
    merge: LoraMerge,
    predict: Callable[[StableDiffusionPipeline], Tensor],
    device: torch.device,
) -> StockComparison:
    """Let stock diffusers add a LoRA to an exported folder, and compare with `merge`, which holds the file's scale.

    `predict` gives outputs of the UNet of a pipeline, for prompts that its own text encoder reads.
    """
    if find_spec("peft") is None:
        return StockComparison(problem="peft is not installed (pip install 'sollune[lora]'), which diffusers needs")
    pipeline = load_pipeline(folder, device)
    modules: Mapping[str, nn.Module] = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    with applied(merge, modules):
        weights, output = _changed_weights(merge, modules), predict(pipeline)
    if problem := _load(pipeline, Path(lora.file), lora.scale):
        return StockComparison(problem=problem)
    stock_output = predict(pipeline)
    pipeline.fuse_lora(components=sorted(merge.components), adapter_names=[ADAPTER])
    pipeline.unload_lora_weights()
    stock = _changed_weights(merge, modules)
    return StockComparison(
        max((_relative(stock[key], weights[key]) for key in weights), default=0.0), _relative(stock_output, output)
    )


def _load(pipeline: StableDiffusionPipeline, file: Path, scale: float) -> str:
    """Load a LoRA as its users do; returns why that failed, or an empty text."""
    try:
        with quiet_libraries():
            pipeline.load_lora_weights(
                str(file.parent), weight_name=file.name, adapter_name=ADAPTER, local_files_only=True
            )
            pipeline.set_adapters(ADAPTER, scale)
    except STOCK_ERRORS as error:
        return in_one_line(error)
    return ""


def _changed_weights(merge: LoraMerge, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The weights that the LoRA changes, as they are now."""
    parameters = {f"{part}.{name}": value for part in modules for name, value in _weights(modules[part])}
    return {key: parameters[key].detach().clone() for key in merge.pairs if key in parameters}


def _weights(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return module.named_parameters()


def _relative(value: Tensor, expected: Tensor) -> float:
    """|value - expected| / |expected|."""
    return float((value - expected).norm() / expected.norm())
