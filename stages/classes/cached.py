"""The classes in a run's cache: their records, and the student's errors at the states stored of them."""

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
from shards.record import Record
from shards.table import Table
from stages.david.assessment import Assessor, assess, bins_of
from stages.david.fusion import FusionConfig
from stages.evaluate.david import config_section
from stages.nets.run_folder import SavedRun, cache_folder
from stages.nets.student import Prediction, Student
from stages.train.block_weighter import DAVID_FOLDER, DavidConfig, load_or_fit_assessor
from stages.train.objective import ObjectiveConfig

RecordNumbers = Sequence[int]
"""Places of records in the train split."""
RECORDS_PER_BATCH = 8


def records_by_class(cache: Path) -> dict[str, list[int]]:
    """Class name -> its records in the train split, from the table."""
    table = Table.open(cache)
    rows = table.rows("train")
    first = rows[table.state_index[rows] == 0]
    records: dict[str, list[int]] = {}
    for number, name in enumerate(table.column("class", first)):
        records.setdefault(table.class_names[name], []).append(number)
    return records


def spread_evenly(records: RecordNumbers, max_records: int) -> list[int]:
    """Up to `max_records` of the records, evenly spaced."""
    count = min(max_records, len(records))
    return [records[i * len(records) // count] for i in range(count)]


@dataclass(frozen=True)
class RunAssessor:
    """The run's David, its weights, and the blocks whose loss counted in the run."""

    assessor: Assessor
    fusion: FusionConfig
    blocks: tuple[str, ...]

    def difficulty(self, batch: Batch, output: Prediction) -> Float[Tensor, " b"]:
        """alpha e_t + beta e_p + delta (1 - coherence) of each state, a mean over the blocks (not cut off at 0)."""
        student, teacher = (
            {b: of[b].float() for b in self.assessor.blocks} for of in (output.features, batch.features)
        )
        assessed = assess(self.assessor, student, teacher, bins_of(batch.k, self.assessor))
        weights, nats = self.fusion, math.log(self.assessor.bins)
        of_blocks = [
            weights.alpha * one.excess / nats + weights.beta * one.divergence + weights.delta * (1 - one.coherence)
            for one in (assessed[block] for block in self.blocks)
        ]
        return torch.stack(of_blocks).mean(0)


def load_run_assessor(run: SavedRun, student: Student, device: torch.device, steps: int) -> RunAssessor | None:
    """The David of a run and its student, or None where the run has none; `steps` are the teacher's."""
    config = config_section(run, "david", DavidConfig)
    if config.published is None and not (run.folder / DAVID_FOLDER).is_dir():
        return None
    assessor = load_or_fit_assessor(config, cache_folder(run.folder), run.folder, device, steps, student.blocks)
    weights = config_section(run, "objective", ObjectiveConfig).block_weights
    return RunAssessor(assessor, config.fusion, tuple(b for b in assessor.blocks if weights.get(b, 1.0) > 0))


@dataclass(frozen=True)
class CacheErrors:
    """Means over the states of each record of C classes."""

    velocity_errors: Sequence[Float[Tensor, " n"]]
    """|v - v*|^2 of both branches over the mean |v*|^2 of all these states"""
    difficulties: Sequence[Float[Tensor, " n"]] | None
    """David's difficulty; None without a David"""


@torch.no_grad()
def measure_cache_errors(
    student: Student,
    reader: Reader,
    classes: Mapping[str, RecordNumbers],
    uncond: Tensor,
    max_records: int,
    run_assessor: RunAssessor | None,
) -> CacheErrors:
    """Evaluate the student at every stored state of up to `max_records` records of each class."""
    errors, norms, difficulties = [], [], []
    for records in tqdm(classes.values(), desc="cache", disable=None):
        of_sizes: dict[torch.Size, list[Record]] = {}
        for number in spread_evenly(records, max_records):
            record = reader.record_at(number)
            of_sizes.setdefault(record.x0.shape, []).append(record)
        batches = [
            _record_errors(student, alike[first : first + RECORDS_PER_BATCH], uncond, run_assessor)
            for alike in of_sizes.values()
            for first in range(0, len(alike), RECORDS_PER_BATCH)
        ]
        error, norm, difficulty = (torch.cat(parts) for parts in zip(*batches, strict=True))
        errors.append(error)
        norms.append(norm)
        difficulties.append(difficulty)
    mean_norm = torch.cat(norms).mean()
    return CacheErrors([error / mean_norm for error in errors], difficulties if run_assessor else None)


def _record_errors(
    student: Student, records: Sequence[Record], uncond: Tensor, run_assessor: RunAssessor | None
) -> tuple[Tensor, ...]:
    """For each record the mean of |v - v*|^2, of |v*|^2 and of David's difficulty (0 without one); all of one size."""
    states = [(record, index) for record in records for index in range(len(record.states))]
    batch = collate([record for record, _ in states], [index for _, index in states]).to(uncond.device, torch.float32)
    output = student(batch.x_s, batch.s, batch.cond, uncond)
    error = mean_squares(output.v_cond - batch.v_cond) + mean_squares(output.v_uncond - batch.v_uncond)
    norm = mean_squares(batch.v_cond) + mean_squares(batch.v_uncond)
    difficulty = run_assessor.difficulty(batch, output).double() if run_assessor else torch.zeros_like(error)
    counts = [len(record.states) for record in records]
    return tuple(
        torch.stack([own.mean() for own in values.cpu().split(counts)]) for values in (error, norm, difficulty)
    )


def mean_squares(v: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """|v|^2 / (c h w) in double precision."""
    return v.double().square().flatten(1).mean(1)
