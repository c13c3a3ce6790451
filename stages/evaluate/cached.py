"""What the run's cache tells of each class: how often it comes, and the student's error at states stored of it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from shards.batch import Batch, collate
from shards.reader import Reader
from shards.table import Table
from stages.david.assessment import Assessor, assess, bins_of
from stages.david.fusion import FusionConfig
from stages.evaluate.david import said_by, settings_of
from stages.nets.saved import SavedRun, cache_of
from stages.nets.student import Student, StudentOutput
from stages.train.david import FOLDER, DavidConfig, assessor_of
from stages.train.objective import ObjectiveConfig

Numbers = Sequence[int]
"""Places of records in the train split."""
RECORDS_AT_ONCE = 8


@dataclass(frozen=True)
class Judge:
    """The run's David, the weights of his errors, and the blocks whose loss counted in the run."""

    assessor: Assessor
    fusion: FusionConfig
    blocks: tuple[str, ...]

    def difficulty(self, batch: Batch, output: StudentOutput) -> Float[Tensor, " b"]:
        """alpha e_t + beta e_p + delta (1 - coherence) of each state, a mean over the blocks (not cut off at 0)."""
        said, stored = ({b: of[b].float() for b in self.assessor.blocks} for of in (output.features, batch.features))
        assessed = assess(self.assessor, said, stored, bins_of(batch.k, self.assessor))
        weights, nats = self.fusion, math.log(self.assessor.bins)
        of_blocks = [
            weights.alpha * one.excess / nats + weights.beta * one.divergence + weights.delta * (1 - one.coherence)
            for one in (assessed[block] for block in self.blocks)
        ]
        return torch.stack(of_blocks).mean(0)


@dataclass(frozen=True)
class Cached:
    """Means over the states of each record of C classes."""

    velocity: Sequence[Float[Tensor, " n"]]
    """|v - v*|^2 of both branches over the mean |v*|^2 of all states looked at"""
    difficulty: Sequence[Float[Tensor, " n"]] | None
    """What David says; None without one."""


def judge_of_run(run: SavedRun, device: torch.device, steps: int) -> Judge | None:
    """The David who judged a run, or None where no David lies in it; `steps` are the teacher's."""
    told = said_by(run)
    config = settings_of(run, told, "david", DavidConfig)
    if config.published is None and not (run.folder / FOLDER).is_dir():
        return None
    assessor = assessor_of(config, cache_of(run.folder), run.folder, device, steps)
    weights = settings_of(run, told, "objective", ObjectiveConfig).block_weights
    return Judge(assessor, config.fusion, tuple(b for b in assessor.blocks if weights.get(b, 1.0) > 0))


def records_by_class(cache: Path) -> dict[str, list[int]]:
    """Class name -> its records in the train split, by the table."""
    table = Table.open(cache)
    rows = table.rows("train")
    first = rows[table.draw[rows] == 0]
    found: dict[str, list[int]] = {}
    for number, name in enumerate(table.column("class", first)):
        found.setdefault(table.class_names[name], []).append(number)
    return found


def spread(numbers: Numbers, most: int) -> list[int]:
    """Up to so many of the records, evenly spread."""
    count = min(most, len(numbers))
    return [numbers[i * len(numbers) // count] for i in range(count)]


@torch.no_grad()
def look(
    student: Student, reader: Reader, classes: Mapping[str, Numbers], uncond: Tensor, most: int, judge: Judge | None
) -> Cached:
    """Ask the student at every stored state of up to `most` records of each class."""
    velocity, hard, whole = [], [], []
    for numbers in tqdm(classes.values(), desc="cache", disable=None):
        seen = [_seen(student, reader, numbers, uncond, judge) for numbers in _few(spread(numbers, most))]
        wrong, wanted, difficulty = (torch.cat(parts) for parts in zip(*seen, strict=True))
        velocity.append(wrong)
        whole.append(wanted)
        hard.append(difficulty)
    norm = torch.cat(whole).mean()
    return Cached([wrong / norm for wrong in velocity], hard if judge else None)


def _few(numbers: Numbers) -> list[Numbers]:
    return [numbers[first : first + RECORDS_AT_ONCE] for first in range(0, len(numbers), RECORDS_AT_ONCE)]


def _seen(
    student: Student, reader: Reader, numbers: Numbers, uncond: Tensor, judge: Judge | None
) -> tuple[Tensor, Tensor, Tensor]:
    """For each record the mean of |v - v*|^2, of |v*|^2 and of what David says (0 without him)."""
    records = [reader.number(number) for number in numbers]
    places = [(record, draw) for record in records for draw in range(len(record.draws))]
    batch = collate([record for record, _ in places], [draw for _, draw in places]).to(uncond.device, torch.float32)
    output = student(batch.x_t, batch.s, batch.cond, uncond)
    wrong = _squares(output.v_cond - batch.v_cond) + _squares(output.v_uncond - batch.v_uncond)
    wanted = _squares(batch.v_cond) + _squares(batch.v_uncond)
    hard = judge.difficulty(batch, output).double() if judge else torch.zeros_like(wrong)
    draws = [len(record.draws) for record in records]
    wrong, wanted, hard = (
        torch.stack([own.mean() for own in values.cpu().split(draws)]) for values in (wrong, wanted, hard)
    )
    return wrong, wanted, hard


def _squares(v: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    return v.double().square().flatten(1).mean(1)
