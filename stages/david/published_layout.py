"""What a GeoDavidCollective checkpoint must hold: sizes read off its shapes, then each tensor compared (david.md 2)."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from configs.refusal import Refused
from stages.david.heads import ATTENTION_HEADS, Companion, HeadSizes, Sizes

PREFIX = "companions."
IGNORED = "loss_calculator."
"""buffers of the training loss, there or not depending on when the checkpoint was saved"""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Header:
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
        """How many modules are listed under `stem`, at least one."""
        found = [re.match(rf"{re.escape(stem)}\.(\d+)\.", name) for name in self.shapes]
        return max((int(match[1]) for match in found if match), default=0) + 1


def sizes_of_blocks(header: Header, config: Mapping[str, Any]) -> dict[str, Sizes]:
    """The sizes of every block, in the order of the configuration.

    Raises `Refused` for another model, for any tensor that is missing, too many or of another shape, and where
    config.json says something else; each by its name.
    """
    shapes = {name: shape for name, shape in header.shapes.items() if not name.startswith(IGNORED)}
    blocks = {name.split(".")[1] for name in shapes if name.startswith(PREFIX)}
    if not blocks or "block_configs" not in config:
        first = min(shapes, default="none")
        raise Refused(
            f"{header.file}: no GeoDavidCollective (block_configs {'' if 'block_configs' in config else 'not '}in "
            f"config.json, first tensor {first}) - other models of that name, such as gated-david, cannot judge a UNet"
        )
    wanted = tuple(config["block_configs"])
    if set(wanted) != blocks:
        raise Refused(f"{header.file}: blocks {sorted(blocks)}, config.json names {sorted(wanted)}")
    sizes = {block: _sizes(header, f"{PREFIX}{block}.") for block in wanted}
    for block in wanted:
        _refuse_other_config(header, block, sizes[block], config)
    expected = {
        f"{PREFIX}{block}.{name}": tuple(tensor.shape)
        for block in wanted
        for name, tensor in on_meta(sizes[block]).state_dict().items()
    }
    _refuse_other_tensors(header.file, shapes, expected)
    return sizes


def on_meta(sizes: Sizes) -> Companion:
    """A companion that takes no memory."""
    with torch.device("meta"):
        return Companion(sizes)


def _sizes(header: Header, at: str) -> Sizes:
    """Sizes are read off vectors where there are any, so that a transposed matrix is found to be the wrong one."""
    flat = f"{at}projection.weight" in header.shapes
    timestep_head, pattern_head = _head(header, f"{at}timestep_head"), _head(header, f"{at}pattern_head")
    patterns, left = divmod(pattern_head.classes, timestep_head.classes)
    if left:
        raise Refused(
            f"{header.file}: {at}pattern_head has {pattern_head.classes} classes, no multiple of "
            f"{timestep_head.classes} bins"
        )
    return Sizes(
        n=header.size(f"{at}projection.{'' if flat else '0.'}weight", 1, rank=2),
        belly=None if flat else header.size(f"{at}projection.0.bias", 0, rank=1),
        d=header.size(f"{at}crystal_pentachora", 3, rank=4),
        bins=timestep_head.classes,
        patterns=patterns,
        timestep_head=timestep_head,
        pattern_head=pattern_head,
    )


def _head(header: Header, at: str) -> HeadSizes:
    if f"{at}.weight" in header.shapes:
        return HeadSizes(header.size(f"{at}.bias", 0, rank=1))
    bottleneck = header.size(f"{at}.experts.0.0.bias", 0, rank=1)
    if bottleneck % ATTENTION_HEADS:
        raise Refused(f"{header.file}: tensor {at}.experts.0.0.bias: {bottleneck} does not divide by {ATTENTION_HEADS}")
    return HeadSizes(
        classes=header.size(f"{at}.class_bias", 0, rank=1),
        bottleneck=bottleneck,
        experts=header.count(f"{at}.experts"),
        gates=header.size(f"{at}.head_weights", 0, rank=1),
    )


def _refuse_other_config(header: Header, block: str, sizes: Sizes, config: Mapping[str, Any]) -> None:
    """config.json may leave things out, but not contradict."""
    said = config["block_configs"][block]
    for name, there, told in (
        ("num_timestep_bins", sizes.bins, config.get("num_timestep_bins")),
        ("num_patterns_per_bin", sizes.patterns, config.get("num_patterns_per_bin")),
        (f"block_configs.{block}.input_dim", sizes.n, said.get("input_dim")),
        (f"block_configs.{block}.scale_dim", sizes.d, said.get("scale_dim")),
    ):
        if told is not None and told != there:
            raise Refused(f"{header.file}: block {block} has {there}, config.json says {name} = {told}")


def _refuse_other_tensors(file: str, shapes: Mapping[str, Shape], expected: Mapping[str, Shape]) -> None:
    for name in sorted(expected.keys() - shapes.keys()):
        raise Refused(f"{file}: tensor {name} is missing - fetch the checkpoint again")
    for name in sorted(shapes.keys() - expected.keys()):
        raise Refused(f"{file}: tensor {name} has no place in a GeoDavidCollective of these sizes")
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise Refused(f"{file}: tensor {name} has shape {list(shapes[name])}, it should be {list(shape)}")
