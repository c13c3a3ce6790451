"""David as the original published him: a GeoDavidCollective checkpoint, judged by its raw logits (david.md 7.7)."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from configs.refusal import Refused, did_you_mean
from stages.david.assessment import Posterior
from stages.david.geometry import duals, inclusion
from stages.david.heads import Companion, Sizes
from stages.david.published_layout import PREFIX, Header, on_meta, sizes_of_blocks

HOOK_POINT = "last resnet of each block, spatial mean, fp32"
"""Where the published David was trained; he refuses features from anywhere else."""
FLOATS = {"F64", "F32", "F16", "BF16"}

Patterns: TypeAlias = Literal["unread", "in_bin", "joint"]
"""unread: pattern heads stay on the disk and patterns have a neutral vote (a fiftieth of the memory); in_bin: the
patterns of the true bin, of which only the first was ever trained; joint: all classes of the pattern head."""


class Published:
    """The companions of a checkpoint, on raw features."""

    def __init__(
        self, companions: Mapping[str, Companion], sizes: Mapping[str, Sizes], patterns: Patterns, steps: int
    ) -> None:
        first = next(iter(sizes.values()))
        self.blocks, self.bins, self.steps = tuple(companions), first.bins, steps
        self.patterns = first.patterns * (first.bins if patterns == "joint" else 1)
        self.alphas = {block: float(companion.cantor_stairs.alpha) for block, companion in companions.items()}
        """what the original took for coherence: a frozen number for each block"""
        self._companions, self._sizes, self._read = companions, sizes, patterns
        # Patterns beyond the first were never trained, and neither were their crystals.
        self._crystals = {b: F.normalize(c.crystal_pentachora[:, 0], dim=2) for b, c in companions.items()}
        self._duals = {block: duals(crystals) for block, crystals in self._crystals.items()}

    @classmethod
    def open(
        cls,
        folder: Path,
        hook_point: str,
        widths: Mapping[str, int],
        steps: int,
        patterns: Patterns = "unread",
        device: torch.device | str = "cpu",
    ) -> "Published":
        """Read `config.json` and `model.safetensors` of a folder.

        `hook_point` and `widths` (block -> channels) are those of the cache, `steps` its teacher's. Raises `Refused`
        for features that he was not trained on and for any tensor that is not as it should be.
        """
        if hook_point != HOOK_POINT:
            raise Refused(f"{folder}: was trained on features of the {HOOK_POINT}; this cache has: {hook_point}")
        weights = folder / "model.safetensors"
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            with safe_open(weights, "pt", device=str(device)) as file:
                sizes = sizes_of_blocks(_header(weights, file), config)
                _refuse_other_widths(folder, sizes, widths)
                companions = {block: _companion(file, weights, block, sizes[block], patterns) for block in sizes}
        except (OSError, ValueError, SafetensorError) as error:
            raise Refused(f"{folder}: cannot be read as a published David ({error}) - fetch it again") from error
        if any(_is_linear(one) for one in sizes.values()):
            print(
                f"{folder}: the older generation, with an untrained timestep head; bins are read off its pattern head"
            )
        return cls(companions, sizes, patterns, steps)

    def posterior(self, block: str, features: Float[Tensor, "b n"], bins: Int[Tensor, " b"]) -> Posterior:
        """What these features say, given the true bin of each sample; patterns that stay unread are all alike."""
        companion, sizes = self._companions[block], self._sizes[block]
        z = companion(features.float())
        log_patterns = features.new_full((len(z), self.patterns), -math.log(self.patterns), dtype=torch.float32)
        if self._read != "unread" or _is_linear(sizes):
            joint = companion.pattern_head(z).log_softmax(dim=1)
            by_bin = joint.unflatten(1, (sizes.bins, sizes.patterns))
            if self._read == "joint":
                log_patterns = joint
            elif self._read == "in_bin":
                log_patterns = by_bin[torch.arange(len(z), device=z.device), bins].log_softmax(dim=1)
        log_bins = by_bin.logsumexp(dim=2) if _is_linear(sizes) else companion.timestep_head(z).log_softmax(dim=1)
        included = inclusion(z, self._crystals[block][bins], self._duals[block][bins])
        return Posterior(log_bins, log_patterns, included.float())


def _is_linear(sizes: Sizes) -> bool:
    return not sizes.timestep_head.experts


def _header(path: Path, file: Any) -> Header:
    """Names and shapes; raises `Refused` for a tensor that holds no real numbers."""
    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - a file is no mapping
    for name, part in slices.items():
        if name.startswith(PREFIX) and part.get_dtype() not in FLOATS:
            raise Refused(f"{path}: tensor {name} has type {part.get_dtype()}, it should be a float")
    return Header(str(path), {name: tuple(part.get_shape()) for name, part in slices.items()})


def _refuse_other_widths(folder: Path, sizes: Mapping[str, Sizes], widths: Mapping[str, int]) -> None:
    for block, one in sizes.items():
        if block not in widths:
            raise Refused(f"{folder}: judges block {block}, the cache has none - {did_you_mean(block, tuple(widths))}")
        if widths[block] != one.n:
            raise Refused(f"{folder}: block {block} takes {one.n} channels, this cache has {widths[block]}")


def _companion(file: Any, path: Path, block: str, sizes: Sizes, patterns: Patterns) -> Companion:
    """One block's weights in fp32, frozen; the pattern head stays on the disk unless it is asked for."""
    companion = on_meta(sizes)
    if patterns == "unread" and not _is_linear(sizes):
        del companion.pattern_head
    tensors = {name: file.get_tensor(f"{PREFIX}{block}.{name}").float() for name in companion.state_dict()}
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise Refused(f"{path}: tensor {PREFIX}{block}.{name} holds numbers that are not finite")
    companion.load_state_dict(tensors, assign=True)
    return companion.eval().requires_grad_(False)
