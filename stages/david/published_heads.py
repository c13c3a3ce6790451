"""The network of one block of the published David, with the names of its checkpoints (david.md 1.2, 1.3, 2.1).

`BlockSizes` decides every name and shape, so that the module itself lists what a checkpoint must hold.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

ATTENTION_HEADS = 4
GATED_SHARE = 0.7


@dataclass(frozen=True)
class HeadSizes:
    """A head of E experts of width b and G gates; no experts: the linear head of the older version."""

    classes: int
    bottleneck: int = 0
    experts: int = 0
    gates: int = 0


@dataclass(frozen=True)
class BlockSizes:
    """One block: n pooled channels -> d; the projection has a `hidden_width`, or is a single layer."""

    n: int
    hidden_width: int | None
    d: int
    bins: int
    patterns: int
    timestep_head: HeadSizes
    pattern_head: HeadSizes


class ProjectiveHead(nn.Module):
    """Experts that attend to each other, gates over all of them, and a direct path.

    logits = 0.7 (sum_i softmax(head_weights)_i gate_i + class_bias) / |temperature| + 0.3 LayerNorm(final).
    The original zeroed unlikely logits in evaluation (`sparsity_threshold`), which gives no posterior: not done here.
    """

    def __init__(self, d: int, sizes: HeadSizes) -> None:
        super().__init__()
        b, joined, classes = sizes.bottleneck, sizes.experts * sizes.bottleneck, sizes.classes
        self.temperature = nn.Parameter(torch.empty(1))
        self.sparsity_threshold = nn.Parameter(torch.empty(()))
        self.head_weights = nn.Parameter(torch.empty(sizes.gates))
        self.class_bias = nn.Parameter(torch.empty(classes))
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(d, b), nn.LayerNorm(b), nn.GELU()) for _ in range(sizes.experts)
        )
        self.cross_attention = nn.MultiheadAttention(b, ATTENTION_HEADS, batch_first=True)
        # The third module is a dropout in the original: no weights, no effect in evaluation.
        self.gate_heads = nn.ModuleList(
            nn.Sequential(nn.Linear(joined, joined // 2), nn.GELU(), nn.Identity(), nn.Linear(joined // 2, classes))
            for _ in range(sizes.gates)
        )
        self.final_projection = nn.Sequential(nn.Linear(joined, classes), nn.LayerNorm(classes))

    def forward(self, z: Float[Tensor, "b d"]) -> Float[Tensor, "b classes"]:
        tokens = torch.stack([expert(z) for expert in self.experts], dim=1)
        attended, _ = self.cross_attention(tokens, tokens, tokens, need_weights=False)
        joined = attended.flatten(1)
        shares = self.head_weights.softmax(dim=0)
        gated = sum(
            (share * gate(joined) for share, gate in zip(shares, self.gate_heads, strict=True)), self.class_bias
        )
        direct: Tensor = self.final_projection(joined)
        return GATED_SHARE * gated / self.temperature.abs() + (1 - GATED_SHARE) * direct


class CantorStairs(nn.Module):
    """Kept for its `alpha`, which the original took for coherence; the staircase has no part in the posteriors."""

    centers: Tensor

    def __init__(self, d: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(()))
        self.feature_to_position = nn.Linear(d, 1)
        self.register_buffer("centers", torch.empty(3))


class PublishedBlockModel(nn.Module):
    """One block: features -> unit vector z -> logits over bins, and over bins x patterns."""

    role_weights: Tensor

    def __init__(self, sizes: BlockSizes) -> None:
        super().__init__()
        self.projection = _make_projection(sizes)
        self.cantor_stairs = CantorStairs(sizes.d)
        self.timestep_head = _make_head(sizes.d, sizes.timestep_head)
        self.pattern_head = _make_head(sizes.d, sizes.pattern_head)
        self.crystal_pentachora = nn.Parameter(torch.empty(sizes.bins, sizes.patterns, 5, sizes.d))
        self.register_buffer("role_weights", torch.empty(5))

    def forward(self, features: Float[Tensor, "b n"]) -> Float[Tensor, "b d"]:
        """The unit vectors of raw pooled features."""
        return F.normalize(self.projection(features), dim=1)


def _make_projection(sizes: BlockSizes) -> nn.Module:
    if sizes.hidden_width is None:
        return nn.Linear(sizes.n, sizes.d, bias=False)
    wide, narrow = nn.Linear(sizes.n, sizes.hidden_width), nn.Linear(sizes.hidden_width, sizes.d, bias=False)
    return nn.Sequential(wide, nn.ReLU(), nn.Identity(), narrow)


def _make_head(d: int, sizes: HeadSizes) -> nn.Module:
    return ProjectiveHead(d, sizes) if sizes.experts else nn.Linear(d, sizes.classes)
