"""How much of the effect of a LoRA on the teacher's velocity the student shows, by branch and by bins of time."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from stages.evaluate.paired import PairedInputs
from stages.flow.bridge import Bridge
from stages.flow.path import interpolate
from stages.prompts import derived_seed
from stages.sampling.fields import TwoBranchField

BIN_EDGES = (0.0, 0.3, 0.6, 0.8, 0.9, 1.0)
"""Of s; narrower towards noise, where 1 / (1 - s) asks for a steeper answer and deltas carry worst."""


@dataclass(frozen=True)
class Effect:
    """The effect on the student's velocity, e_S = v(with) - v(without), against the teacher's e_T at the same states.

    All are None where the teacher shows no effect.
    """

    ratio: float | None
    """|e_S| / |e_T|: below 1 the LoRA is weaker on the student."""
    slope: float | None
    """<e_S, e_T> / <e_T, e_T>: how much of the teacher's own effect is in it."""
    cosine: float | None


@dataclass(frozen=True)
class VelocityEffect:
    """The effect on one branch, over all states and over those of each bin of `BIN_EDGES`."""

    overall: Effect
    by_bin: Sequence[Effect]


@dataclass(frozen=True)
class LoraStates:
    """States on straight lines from pictures of teacher + LoRA to fresh noise: each picture once in each bin of s."""

    x: Float[Tensor, "n c h w"]
    s: Float[Tensor, " n"]
    """The teacher's own times, or between its last one and 1."""
    picture: Tensor
    """Which prompt each state belongs to, [n]."""

    @classmethod
    def between(
        cls, x0: Float[Tensor, "b c h w"], noise: Float[Tensor, "b c h w"], bridge: Bridge, seed: int
    ) -> "LoraStates":
        """Times are uniform in each bin, then moved to the nearest at which the teacher can be evaluated."""
        generator = torch.Generator().manual_seed(derived_seed("times of states", seed))
        edges = torch.tensor(BIN_EDGES, dtype=torch.float64)
        u = torch.rand(len(edges) - 1, len(x0), generator=generator, dtype=torch.float64)
        s = (edges[:-1, None] + u * edges.diff()[:, None]).flatten().to(x0.device)
        _, s = bridge.nearest_state(s)
        picture = torch.arange(len(x0), device=x0.device).repeat(len(edges) - 1)
        return cls(interpolate(x0[picture], noise[picture], s), s, picture)


def velocities(
    field: TwoBranchField, states: LoraStates, inputs: PairedInputs, batch_size: int
) -> Float[Tensor, "2 n c h w"]:
    """Conditional and unconditional velocities at the states, with the encodings of `inputs`."""
    parts = [
        torch.stack(field.branches(states.x[rows], states.s[rows], inputs.cond[states.picture[rows]], inputs.uncond))
        for rows in torch.arange(len(states.s), device=states.s.device).split(batch_size)
    ]
    return torch.cat(parts, 1)


def compare_effects(
    student: Float[Tensor, "2 n c h w"], teacher: Float[Tensor, "2 n c h w"], s: Float[Tensor, " n"]
) -> tuple[VelocityEffect, VelocityEffect]:
    """Effects on the conditional and the unconditional branch."""
    bins = torch.bucketize(s, torch.tensor(BIN_EDGES[1:-1], dtype=s.dtype, device=s.device))

    def effects(own: Tensor, expected: Tensor) -> VelocityEffect:
        rows = [bins == number for number in range(len(BIN_EDGES) - 1)]
        return VelocityEffect(_effect(own, expected), [_effect(own[one], expected[one]) for one in rows])

    return effects(student[0], teacher[0]), effects(student[1], teacher[1])


def _effect(student: Float[Tensor, "n ..."], teacher: Float[Tensor, "n ..."]) -> Effect:
    own, expected = student.double().flatten(), teacher.double().flatten()
    size, wanted, product = float(own.norm()), float(expected.norm()), float(own @ expected)
    if wanted == 0:
        return Effect(None, None, None)
    return Effect(size / wanted, product / wanted**2, product / (size * wanted) if size else None)
