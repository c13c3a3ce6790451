"""What David sees in a student, block by block and along the time: the three numbers, and the lambda that follows."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from shards.batch import Batch
from stages.david.assessment import Assessor, BlockAssessment, assess, bins_of, reduce
from stages.david.fusion import Heard, lambdas
from stages.david.voice import Voice
from stages.flow.timesteps import bin_of_step
from stages.nets.student import Student

COLUMNS = 20
"""Equal parts of the teacher's steps in a map; fewer where David has fewer bins."""


@dataclass(frozen=True)
class Sight:
    """Maps of nblocks rows and as many columns as parts of the time; a part without a state is nan."""

    timestep_error: Float[Tensor, "n_blocks parts"]
    pattern_error: Float[Tensor, "n_blocks parts"]
    coherence: Float[Tensor, "n_blocks parts"]
    lambdas: Float[Tensor, "n_blocks parts"]


@torch.no_grad()
def features_of(student: Student, batches: Iterator[Batch], uncond: Tensor) -> dict[str, Float[Tensor, "m n"]]:
    """What each block says at the states of these batches."""
    said: dict[str, list[Tensor]] = {}
    for batch in batches:
        batch = batch.to(uncond.device, torch.float32)
        for block, feature in student(batch.x_t, batch.s, batch.cond, uncond).features.items():
            said.setdefault(block, []).append(feature)
    return {block: torch.cat(parts) for block, parts in said.items()}


def see(
    assessor: Assessor,
    voice: Voice,
    student: Mapping[str, Float[Tensor, "m n"]],
    teacher: Mapping[str, Float[Tensor, "m n"]],
    k: Int[Tensor, " m"],
) -> Sight:
    """The maps of a student's features against the teacher's at the same states, at the teacher's steps k."""
    bins = bins_of(k, assessor)
    assessed = assess(assessor, student, teacher, bins)
    count = min(COLUMNS, assessor.bins)
    part = bin_of_step(k, count, assessor.steps)
    columns = [judged(assessed, part == i, assessor.bins, voice) for i in range(count)]
    maps = (torch.stack(maps, dim=1) for maps in zip(*columns, strict=True))
    return Sight(*maps)


def judged(
    assessed: Mapping[str, BlockAssessment], here: Tensor, bins: int, voice: Voice
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Timestep error, pattern error, coherence and lambda of every block over the states that lie here."""
    if not here.any():
        nothing = torch.full((len(assessed),), float("nan"))
        return nothing, nothing, nothing, nothing
    found = reduce({block: _rows(one, here) for block, one in assessed.items()}, bins)
    three = [torch.stack(list(of.values())) for of in (found.timestep_error, found.pattern_error, found.coherence)]
    raw = [torch.stack([getattr(one, name)[here].mean() for one in assessed.values()]) for name in RAW]
    spoken = lambdas(Heard(*three, *raw), voice.known)
    e_t, e_p, coherence, weight = (values.cpu() for values in (*three, spoken))
    return e_t, e_p, coherence, weight


RAW = ("cross_entropy", "entropy")


def _rows(one: BlockAssessment, here: Tensor) -> BlockAssessment:
    fields = ("excess", "divergence", "coherence", *RAW)
    return BlockAssessment(**{name: getattr(one, name)[here] for name in fields})
