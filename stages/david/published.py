"""The published David: a GeoDavidCollective checkpoint, verified tensor by tensor, used by its raw logits.

Sizes are inferred from the shapes (david.md sections 2 and 7.7).
"""

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stages.david.assessment import Posterior
from stages.david.geometry import barycentric_gradients, inclusion_ratio
from stages.david.published_heads import ATTENTION_HEADS, BlockSizes, HeadSizes, PublishedBlockModel
from stages.system.refusal import Refused, did_you_mean

PREFIX = "companions."
IGNORED_PREFIX = "loss_calculator."
"""buffers of the training loss, there or not depending on when the checkpoint was saved"""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class TensorHeader:
    """The tensors of a file by name, without their values."""

    file: str
    shapes: Mapping[str, Shape]

    def size(self, name: str, axis: int, rank: int) -> int:
        """One size of a tensor; raises `Refused` when it is missing or has another number of axes."""
        if name not in self.shapes:
            raise Refused(f"{self.file}: tensor {name} is missing - fetch the checkpoint again")
        shape = self.shapes[name]
        if len(shape) != rank:
            raise Refused(f"{self.file}: tensor {name} has shape {list(shape)}, it should have {rank} axes")
        return shape[axis]

    def count(self, stem: str) -> int:
        """Number of modules listed under `stem`, at least one."""
        matches = [re.match(rf"{re.escape(stem)}\.(\d+)\.", name) for name in self.shapes]
        return max((int(match[1]) for match in matches if match), default=0) + 1


def infer_block_sizes(header: TensorHeader, config: Mapping[str, Any]) -> dict[str, BlockSizes]:
    """The sizes of every block, in the order of the configuration.

    Raises `Refused` for another model, for any tensor that is missing, too many or of another shape, and where
    config.json contradicts the shapes; each by its name.
    """
    shapes = {name: shape for name, shape in header.shapes.items() if not name.startswith(IGNORED_PREFIX)}
    blocks = {name.split(".")[1] for name in shapes if name.startswith(PREFIX)}
    if not blocks or "block_configs" not in config:
        first = min(shapes, default="none")
        raise Refused(
            f"{header.file}: no GeoDavidCollective (block_configs {'' if 'block_configs' in config else 'not '}in "
            f"config.json, first tensor {first}) - other models of that name, such as gated-david, cannot assess a UNet"
        )
    wanted = tuple(config["block_configs"])
    if set(wanted) != blocks:
        raise Refused(f"{header.file}: blocks {sorted(blocks)}, config.json names {sorted(wanted)}")
    sizes = {block: _infer_sizes(header, f"{PREFIX}{block}.") for block in wanted}
    for block in wanted:
        _refuse_other_config(header, block, sizes[block], config)
    expected = {
        f"{PREFIX}{block}.{name}": tuple(tensor.shape)
        for block in wanted
        for name, tensor in meta_block_model(sizes[block]).state_dict().items()
    }
    _refuse_other_tensors(header.file, shapes, expected)
    return sizes


def meta_block_model(sizes: BlockSizes) -> PublishedBlockModel:
    """A block model on the meta device, which takes no memory."""
    with torch.device("meta"):
        return PublishedBlockModel(sizes)


def _infer_sizes(header: TensorHeader, prefix: str) -> BlockSizes:
    """Sizes are read off vectors where there are any, so that a transposed matrix is recognised."""
    flat = f"{prefix}projection.weight" in header.shapes
    timestep_head, pattern_head = (
        _infer_head_sizes(header, f"{prefix}{head}_head") for head in ("timestep", "pattern")
    )
    patterns, remainder = divmod(pattern_head.classes, timestep_head.classes)
    if remainder:
        raise Refused(
            f"{header.file}: {prefix}pattern_head has {pattern_head.classes} classes, no multiple of "
            f"{timestep_head.classes} bins"
        )
    return BlockSizes(
        n=header.size(f"{prefix}projection.{'' if flat else '0.'}weight", 1, rank=2),
        hidden_width=None if flat else header.size(f"{prefix}projection.0.bias", 0, rank=1),
        d=header.size(f"{prefix}crystal_pentachora", 3, rank=4),
        bins=timestep_head.classes,
        patterns=patterns,
        timestep_head=timestep_head,
        pattern_head=pattern_head,
    )


def _infer_head_sizes(header: TensorHeader, prefix: str) -> HeadSizes:
    if f"{prefix}.weight" in header.shapes:
        return HeadSizes(header.size(f"{prefix}.bias", 0, rank=1))
    bottleneck = header.size(f"{prefix}.experts.0.0.bias", 0, rank=1)
    if bottleneck % ATTENTION_HEADS:
        raise Refused(
            f"{header.file}: tensor {prefix}.experts.0.0.bias: {bottleneck} does not divide by {ATTENTION_HEADS}"
        )
    return HeadSizes(
        classes=header.size(f"{prefix}.class_bias", 0, rank=1),
        bottleneck=bottleneck,
        experts=header.count(f"{prefix}.experts"),
        gates=header.size(f"{prefix}.head_weights", 0, rank=1),
    )


def _refuse_other_config(header: TensorHeader, block: str, sizes: BlockSizes, config: Mapping[str, Any]) -> None:
    """config.json may leave things out, but not contradict the shapes."""
    block_config = config["block_configs"][block]
    for name, actual, configured in (
        ("num_timestep_bins", sizes.bins, config.get("num_timestep_bins")),
        ("num_patterns_per_bin", sizes.patterns, config.get("num_patterns_per_bin")),
        (f"block_configs.{block}.input_dim", sizes.n, block_config.get("input_dim")),
        (f"block_configs.{block}.scale_dim", sizes.d, block_config.get("scale_dim")),
    ):
        if configured is not None and configured != actual:
            raise Refused(f"{header.file}: block {block} has {actual}, config.json has {name} = {configured}")


def _refuse_other_tensors(file: str, shapes: Mapping[str, Shape], expected: Mapping[str, Shape]) -> None:
    for name in sorted(expected.keys() - shapes.keys()):
        raise Refused(f"{file}: tensor {name} is missing - fetch the checkpoint again")
    for name in sorted(shapes.keys() - expected.keys()):
        raise Refused(f"{file}: tensor {name} has no place in a GeoDavidCollective of these sizes")
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise Refused(f"{file}: tensor {name} has shape {list(shapes[name])}, it should be {list(shape)}")


HOOK_POINT = "last resnet of each block, spatial mean, fp32"
"""Of the features that the published David was trained on; others are refused."""
FLOAT_DTYPES = {"F64", "F32", "F16", "BF16"}

PatternMode: TypeAlias = Literal["unread", "in_bin", "joint"]
"""unread: pattern heads are not loaded and pattern posteriors are uniform (a fiftieth of the memory); in_bin: the
patterns of the true bin, of which only the first was ever trained; joint: all classes of the pattern head."""


class PublishedAssessor:
    """The block models of a checkpoint, on raw features."""

    def __init__(
        self,
        block_models: Mapping[str, PublishedBlockModel],
        sizes: Mapping[str, BlockSizes],
        pattern_mode: PatternMode,
        steps: int,
    ) -> None:
        first = next(iter(sizes.values()))
        self.blocks, self.bins, self.steps = tuple(block_models), first.bins, steps
        self.patterns = first.patterns * (first.bins if pattern_mode == "joint" else 1)
        self.cantor_alphas = {block: float(model.cantor_stairs.alpha) for block, model in block_models.items()}
        """the original's coherence: a frozen number for each block"""
        self._block_models, self._sizes, self._pattern_mode = block_models, sizes, pattern_mode
        # Patterns beyond the first were never trained, and neither were their crystals.
        self._pentachora = {b: F.normalize(m.crystal_pentachora[:, 0], dim=2) for b, m in block_models.items()}
        self._gradients = {b: barycentric_gradients(vertices) for b, vertices in self._pentachora.items()}

    @classmethod
    def open(
        cls,
        folder: Path,
        hook_point: str,
        widths: Mapping[str, int],
        steps: int,
        pattern_mode: PatternMode = "unread",
        device: torch.device | str = "cpu",
        blocks: Collection[str] | None = None,
    ) -> "PublishedAssessor":
        """Read `config.json` and `model.safetensors` of a folder.

        `hook_point` and `widths` (block -> channels) are those of the cache, `steps` its teacher's; only `blocks` are
        assessed, none: all. Raises `Refused`
        for features of another hook point or width, and for any tensor that is not as it should be.
        """
        if hook_point != HOOK_POINT:
            raise Refused(f"{folder}: was trained on features of the {HOOK_POINT}; this cache has: {hook_point}")
        weights = folder / "model.safetensors"
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            with safe_open(weights, "pt", device=str(device)) as file:
                sizes = infer_block_sizes(_read_header(weights, file), config)
                _refuse_other_widths(folder, sizes, widths)
                assessed = [block for block in sizes if blocks is None or block in blocks]
                models = {
                    block: _load_block_model(file, weights, block, sizes[block], pattern_mode) for block in assessed
                }
        except (OSError, ValueError, SafetensorError) as error:
            raise Refused(f"{folder}: cannot be read as a published David ({error}) - fetch it again") from error
        if any(map(_has_linear_head, sizes.values())):
            print(f"{folder}: an older version, with an untrained timestep head; bins are read off its pattern head")
        return cls(models, sizes, pattern_mode, steps)

    def posterior(self, block: str, features: Float[Tensor, "b n"], bins: Int[Tensor, " b"]) -> Posterior:
        """Posteriors of these features, given the true bin of each sample; unread patterns are uniform."""
        model, sizes = self._block_models[block], self._sizes[block]
        z = model(features.float())
        log_patterns = features.new_full((len(z), self.patterns), -math.log(self.patterns), dtype=torch.float32)
        if self._pattern_mode != "unread" or _has_linear_head(sizes):
            joint = model.pattern_head(z).log_softmax(dim=1)
            by_bin = joint.unflatten(1, (sizes.bins, sizes.patterns))
            if self._pattern_mode == "joint":
                log_patterns = joint
            elif self._pattern_mode == "in_bin":
                log_patterns = by_bin[torch.arange(len(z), device=z.device), bins].log_softmax(dim=1)
        log_bins = by_bin.logsumexp(dim=2) if _has_linear_head(sizes) else model.timestep_head(z).log_softmax(dim=1)
        inclusion = inclusion_ratio(z, self._pentachora[block][bins], self._gradients[block][bins])
        return Posterior(log_bins, log_patterns, inclusion.float())


def _has_linear_head(sizes: BlockSizes) -> bool:
    return not sizes.timestep_head.experts


def _read_header(path: Path, file: Any) -> TensorHeader:
    """Names and shapes; raises `Refused` for a tensor that is not of floats."""
    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - a file is no mapping
    for name, part in slices.items():
        if name.startswith(PREFIX) and part.get_dtype() not in FLOAT_DTYPES:
            raise Refused(f"{path}: tensor {name} has type {part.get_dtype()}, it should be a float")
    return TensorHeader(str(path), {name: tuple(part.get_shape()) for name, part in slices.items()})


def _refuse_other_widths(folder: Path, sizes: Mapping[str, BlockSizes], widths: Mapping[str, int]) -> None:
    for block, size in sizes.items():
        if block not in widths:
            raise Refused(f"{folder}: assesses block {block}, the cache has none - {did_you_mean(block, [*widths])}")
        if widths[block] != size.n:
            raise Refused(f"{folder}: block {block} takes {size.n} channels, this cache has {widths[block]}")


def _load_block_model(
    file: Any, path: Path, block: str, sizes: BlockSizes, pattern_mode: PatternMode
) -> PublishedBlockModel:
    """One block's weights in fp32, frozen; without the pattern head where no mode needs it."""
    model = meta_block_model(sizes)
    if pattern_mode == "unread" and not _has_linear_head(sizes):
        del model.pattern_head
    tensors = {name: file.get_tensor(f"{PREFIX}{block}.{name}").float() for name in model.state_dict()}
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise Refused(f"{path}: tensor {PREFIX}{block}.{name} holds numbers that are not finite")
    model.load_state_dict(tensors, assign=True)
    return model.eval().requires_grad_(False)
