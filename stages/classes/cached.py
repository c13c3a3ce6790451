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
from stages.evaluate.david import config_section, read_distill_config
from stages.nets.saved import SavedRun, cache_folder
from stages.nets.student import Prediction, Student
from stages.train.assessor import DAVID_FOLDER, DavidConfig, load_or_fit_assessor
from stages.train.objective import ObjectiveConfig

RecordNumbers = Sequence[int]
"""Places of records in the train split."""
RECORDS_PER_BATCH = 8


@dataclass(frozen=True)
class RunAssessor:
    """The run's David, the weights of his errors, and the blocks whose loss counted in the run."""

    assessor: Assessor
    fusion: FusionConfig
    blocks: tuple[str, ...]

    def difficulty(self, batch: Batch, output: Prediction) -> Float[Tensor, " b"]:
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
class CacheErrors:
    """Means over the states of each record of C classes."""

    velocity_errors: Sequence[Float[Tensor, " n"]]
    """|v - v*|^2 of both branches over the mean |v*|^2 of all states looked at"""
    difficulties: Sequence[Float[Tensor, " n"]] | None
    """What David says; None without one."""


def load_run_assessor(run: SavedRun, device: torch.device, steps: int) -> RunAssessor | None:
    """The David who judged a run, or None where no David lies in it; `steps` are the teacher's."""
    told = read_distill_config(run)
    config = config_section(run, told, "david", DavidConfig)
    if config.published is None and not (run.folder / DAVID_FOLDER).is_dir():
        return None
    assessor = load_or_fit_assessor(config, cache_folder(run.folder), run.folder, device, steps)
    weights = config_section(run, told, "objective", ObjectiveConfig).block_weights
    return RunAssessor(assessor, config.fusion, tuple(b for b in assessor.blocks if weights.get(b, 1.0) > 0))


def records_by_class(cache: Path) -> dict[str, list[int]]:
    """Class name -> its records in the train split, by the table."""
    table = Table.open(cache)
    rows = table.rows("train")
    first = rows[table.state_index[rows] == 0]
    found: dict[str, list[int]] = {}
    for number, name in enumerate(table.column("class", first)):
        found.setdefault(table.class_names[name], []).append(number)
    return found


def spread_evenly(records: RecordNumbers, max_records: int) -> list[int]:
    """Up to so many of the records, evenly spread."""
    count = min(max_records, len(records))
    return [records[i * len(records) // count] for i in range(count)]


@torch.no_grad()
def measure_cache_errors(
    student: Student,
    reader: Reader,
    classes: Mapping[str, RecordNumbers],
    uncond: Tensor,
    max_records: int,
    run_assessor: RunAssessor | None,
) -> CacheErrors:
    """Ask the student at every stored state of up to `most` records of each class."""
    velocity, hard, whole = [], [], []
    for numbers in tqdm(classes.values(), desc="cache", disable=None):
        seen = [
            _record_errors(student, reader, numbers, uncond, run_assessor)
            for numbers in _split_batches(spread_evenly(numbers, max_records))
        ]
        wrong, wanted, difficulty = (torch.cat(parts) for parts in zip(*seen, strict=True))
        velocity.append(wrong)
        whole.append(wanted)
        hard.append(difficulty)
    norm = torch.cat(whole).mean()
    return CacheErrors([wrong / norm for wrong in velocity], hard if run_assessor else None)


def _split_batches(numbers: RecordNumbers) -> list[RecordNumbers]:
    return [numbers[first : first + RECORDS_PER_BATCH] for first in range(0, len(numbers), RECORDS_PER_BATCH)]


def _record_errors(
    student: Student, reader: Reader, numbers: RecordNumbers, uncond: Tensor, run_assessor: RunAssessor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """For each record the mean of |v - v*|^2, of |v*|^2 and of what David says (0 without him)."""
    records = [reader.record_at(number) for number in numbers]
    places = [(record, draw) for record in records for draw in range(len(record.states))]
    batch = collate([record for record, _ in places], [draw for _, draw in places]).to(uncond.device, torch.float32)
    output = student(batch.x_t, batch.s, batch.cond, uncond)
    wrong = _mean_squares(output.v_cond - batch.v_cond) + _mean_squares(output.v_uncond - batch.v_uncond)
    wanted = _mean_squares(batch.v_cond) + _mean_squares(batch.v_uncond)
    hard = run_assessor.difficulty(batch, output).double() if run_assessor else torch.zeros_like(wrong)
    draws = [len(record.states) for record in records]
    wrong, wanted, hard = (
        torch.stack([own.mean() for own in values.cpu().split(draws)]) for values in (wrong, wanted, hard)
    )
    return wrong, wanted, hard


def _mean_squares(v: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    return v.double().square().flatten(1).mean(1)
