"""The batches of class finetuning: rows of the classes, and rows of the distillation cache (the prior).

Rows of the classes may learn from the data itself, eps - x0 under new noise. Such a picture has the guidance scale
under which it is to be sampled, and the loss compares the guided student with eps - x0: a student whose conditional
branch learns what guidance made is guided twice when it is sampled (in the embedded world its share of right pictures
fell from .98 to .57).
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import count
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from shards.batch import Batch, concatenate
from shards.reader import Reader
from shards.record import Record
from stages.classes.selection import owner_of_record
from stages.classes.specification import ClassFile
from stages.flow.path import interpolate
from stages.flow.timesteps import TimestepDensity
from stages.prompts import derived_seed
from stages.system.refusal import Refused

DEFAULT_PRIOR_SHARE = 0.3
PRIOR_GROUP = "(prior)"

RowIndices: TypeAlias = Int[np.ndarray, " n"]


def split_batch_size(batch_size: int, prior_share: float) -> tuple[int, int]:
    """Rows of classes and of prior in a batch; raises `Refused` when either gets none."""
    prior = round(batch_size * prior_share)
    if not 0 < prior < batch_size:
        raise Refused(
            f"prior_share = {prior_share}: gives {prior} of {batch_size} rows to the prior - "
            "both streams need at least one"
        )
    return batch_size - prior, prior


@dataclass(frozen=True)
class DataTarget:
    """The pictures with learning target `data`, by key; noise and time of a row depend on its sample number alone."""

    x0: Mapping[str, Float[Tensor, "c h w"]]
    guidance: Mapping[str, float]
    """the scale under which each is to be sampled"""
    seed: int
    density: TimestepDensity

    @classmethod
    def from_records(
        cls, records: Iterable[Record], guidance: Mapping[str, float], seed: int, density: TimestepDensity
    ) -> "DataTarget":
        """The pictures of these records (32 KiB each for SD1.5), each at the scale listed, or else at its record's.

        Raises `Refused` naming one with a scale below 1, under which v_cond has little effect.
        """
        x0: dict[str, Tensor] = {}
        scales: dict[str, float] = {}
        for record in records:
            x0[record.key], scales[record.key] = record.x0, guidance.get(record.key, record.guidance_scale)
            if scales[record.key] < 1:
                raise Refused(
                    f"record {record.key} ({record.text!r}): target is data, but it was generated at guidance "
                    f"{scales[record.key]:.3g} - generate at guidance 1 or above, or set its target to teacher"
                )
        return cls(x0, scales, seed, density)

    def apply(self, batch: Batch, samples: Int[np.ndarray, " b"]) -> Batch:
        """The batch with new noise in each row of these pictures; `samples` are the sample numbers of the rows.

        There x_s = (1 - s) x0 + s eps, v_cond = eps - x0, and `own_guidance` is the picture's. `v_uncond`, `k` and the
        features remain those of the stored state, and the loss ignores them.
        """
        rows = [row for row, key in enumerate(batch.keys) if key in self.x0]
        if not rows:
            return batch
        states = [self._sample_state(int(samples[row]), self.x0[batch.keys[row]].float()) for row in rows]
        s, x_s, v = (torch.stack(column) for column in zip(*states, strict=True))
        at, scales = torch.tensor(rows), torch.tensor([self.guidance[batch.keys[row]] for row in rows])
        return replace(
            batch,
            s=batch.s.index_copy(0, at, s.to(batch.s.dtype)),
            x_s=batch.x_s.index_copy(0, at, x_s.to(batch.x_s.dtype)),
            v_cond=batch.v_cond.index_copy(0, at, v.to(batch.v_cond.dtype)),
            own_guidance=torch.zeros(len(batch)).index_copy(0, at, scales),
        )

    def _sample_state(self, sample_number: int, x0: Float[Tensor, "c h w"]) -> tuple[Tensor, Tensor, Tensor]:
        """s, x_s and v of one sample, on the CPU."""
        generator = torch.Generator().manual_seed(derived_seed("data", self.seed, sample_number))
        s = self.density.sample(1, generator).float()
        eps = torch.randn(x0.shape, generator=generator)
        return s[0], interpolate(x0[None], eps[None], s)[0], eps - x0


def class_numbers(classes: ClassFile, class_names: Iterable[str]) -> dict[str, int]:
    """Class name of a record -> number of its class; without the names that no class owns, which are never sampled."""
    numbers = {spec.name: number for number, spec in enumerate(classes.classes)}
    owners = {name: owner_of_record(classes, name) for name in class_names}
    return {name: numbers[spec.name] for name, spec in owners.items() if spec}


@dataclass(frozen=True)
class Mixture:
    """Every batch has the same number of rows of each stream, so its content depends on its number alone.

    A row's `group` is the number of its class; that of the prior comes after all classes. The rows of the classes come
    first, and rank r of `world` takes the rows n with n mod world = r. The batch sizes of both readers count the rows
    of all ranks.
    """

    classes: Reader
    prior: Reader
    class_names: tuple[str, ...]
    class_numbers: Mapping[str, int]
    """class name of a record -> number of its class"""
    data_target: DataTarget | None = None
    rank: int = 0
    world: int = 1

    @property
    def group_names(self) -> tuple[str, ...]:
        """The groups of rows in the journal, by number."""
        return (*self.class_names, PRIOR_GROUP)

    def batches(self, start_sample: int) -> Iterator[Batch]:
        """This rank's rows of the batches from this sample on, a whole number of batches from the beginning."""
        class_rows, size = self.classes.batch_size, self.classes.batch_size + self.prior.batch_size
        first, rest = divmod(start_sample, size)
        if rest:
            raise ValueError(f"sample {start_sample} is {rest} rows into a batch")
        rows = np.arange(self.rank, size, self.world)
        in_classes, in_prior = rows[rows < class_rows], rows[rows >= class_rows] - class_rows
        streams = []
        if len(in_classes):
            streams.append(self._class_batches(in_classes, first, size))
        if len(in_prior):
            streams.append(self._prior_batches(in_prior, first))
        for parts in zip(*streams, strict=True):
            yield concatenate(parts)

    def _class_batches(self, rows: RowIndices, first_batch: int, batch_size: int) -> Iterator[Batch]:
        """The rows of classes with their learning targets; a row's sample number counts the rows of both streams."""
        for number, batch in enumerate(_read_rows(self.classes, rows, first_batch), first_batch):
            samples = number * batch_size + rows
            batch = self.data_target.apply(batch, samples) if self.data_target else batch
            yield replace(batch, group=torch.tensor([self.class_numbers[name] for name in batch.class_names]))

    def _prior_batches(self, rows: RowIndices, first_batch: int) -> Iterator[Batch]:
        for batch in _read_rows(self.prior, rows, first_batch):
            yield replace(batch, group=torch.full((len(batch),), len(self.class_names)))


def _read_rows(reader: Reader, rows: RowIndices, first_batch: int) -> Iterator[Batch]:
    """These rows of a reader's batches, from one batch on."""
    return reader.read_places(number * reader.batch_size + rows for number in count(first_batch))
