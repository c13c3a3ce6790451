"""The batches of class finetuning: rows of the classes, and rows of the distillation cache (the prior).

Rows of the classes may learn from the data itself, eps - x0 under new noise. Such a picture has the guidance scale
under which it is to be sampled, and the loss compares the guided student with eps - x0: a student whose conditional
branch learns what guidance made is guided twice when it is sampled (in the embedded world its share of right pictures
fell from .98 to .57).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from itertools import count
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from configs.values import PictureSize
from shards.batch import Batch, concatenate, map_ahead
from shards.reader import Reader
from shards.record import Record
from shards.stream.order import Order
from shards.stream.schedule import SizeSchedule
from stages.classes.selection import owner_of_record
from stages.classes.specification import ClassFile
from stages.flow.path import interpolate
from stages.flow.timesteps import TimestepDensity
from stages.prompts import derived_seed
from stages.system.refusal import Refused

DEFAULT_PRIOR_SHARE = 0.3
PRIOR_GROUP = "(prior)"

RowIndices: TypeAlias = Int[np.ndarray, " n"]
BatchSplit: TypeAlias = Callable[[PictureSize | None], tuple[int, int]]
"""Size -> rows of classes and of prior in a batch of it."""


def split_batch_size(batch_size: int, prior_share: float, size: PictureSize | None = None) -> tuple[int, int]:
    """Rows of classes and of prior in a batch, of one picture size; raises `Refused` when either gets none."""
    prior = round(batch_size * prior_share)
    if not 0 < prior < batch_size:
        raise Refused(
            f"prior_share = {prior_share}: gives {prior} of {batch_size} rows{f' of {size}' if size else ''} to the "
            "prior - both streams need at least one: change it, or take larger batches"
        )
    return batch_size - prior, prior


def refuse_missing_sizes(sizes: Iterable[PictureSize | None], prior: Reader) -> None:
    """Raise `Refused` for a size of the classes' pictures of which the prior has no rows."""
    known = [size for size, order in zip(prior.sizes, prior.orders, strict=True) if order is not None]
    for size in sizes:
        if size not in known:
            raise Refused(
                f"{prior.folder}: holds no picture of {size}, and pictures of the classes have that size; it has "
                f"{', '.join(map(str, known))} - render it there too (render.sizes of cache-teacher), or not here"
            )


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
    """Every batch has one picture size and as many rows of each stream as that size has, so it depends on its number.

    The schedule of the classes' sizes decides which size a batch has; both streams have an order for each size. A row's
    `group` is the number of its class; that of the prior comes after all classes. The rows of the classes come first,
    and rank r of `world` takes the rows n with n mod world = r.
    """

    classes: Reader
    prior: Reader
    class_names: tuple[str, ...]
    class_numbers: Mapping[str, int]
    """class name of a record -> number of its class"""
    rows: BatchSplit
    """size -> rows of classes and of prior in a batch of it, of all ranks"""
    data_target: DataTarget | None = None
    rank: int = 0
    world: int = 1

    @property
    def group_names(self) -> tuple[str, ...]:
        """The groups of rows in the journal, by number."""
        return (*self.class_names, PRIOR_GROUP)

    @property
    def sizes(self) -> tuple[PictureSize, ...]:
        """The picture sizes of the classes, as far as they are known."""
        return tuple(size for size in self.classes.sizes if size is not None)

    @cached_property
    def schedule(self) -> SizeSchedule:
        """Which size each batch has: the rows of the classes come out in the shares of their sizes.

        Raises `Refused` for a size that the classes have and the prior has not.
        """
        samples = self.classes.schedule.samples
        sizes = [size for size, share in zip(self.classes.sizes, samples, strict=True) if share]
        refuse_missing_sizes(sizes, self.prior)
        split = [self.rows(size) for size in self.classes.sizes]
        rows = [sum(both) for both in split]
        # As many batches of each size as the rows of the classes take: in one of `rows` rows only a part is theirs.
        weights = [Fraction(n) * both / own for n, both, (own, _) in zip(samples, rows, split, strict=True)]
        return SizeSchedule(weights, rows)

    def batches(self, start_sample: int) -> Iterator[Batch]:
        """This rank's rows of the batches from this sample on, a whole number of batches from the beginning."""
        first = self.schedule.block_of(start_sample)
        if rest := start_sample - self.schedule.first_sample(first):
            raise ValueError(f"sample {start_sample} is {rest} rows into a batch")
        for reader in (self.classes, self.prior):
            reader.batch(np.arange(1))  # what is read once is read here, not in several threads
        return map_ahead(self._batch, count(first), max(self.classes.workers, self.prior.workers))

    def _batch(self, number: int) -> Batch:
        """This rank's rows of one batch; a row's sample number counts the rows of both streams."""
        schedule = self.schedule
        number_of_size = schedule.size_of_block(number)
        size, before = self.classes.sizes[number_of_size], schedule.counts(number)[number_of_size]
        class_rows, prior_rows = self.rows(size)
        rows = np.arange(self.rank, class_rows + prior_rows, self.world)
        in_classes, in_prior = rows[rows < class_rows], rows[rows >= class_rows] - class_rows
        parts = []
        if len(in_classes):
            batch = self._read(self.classes, size, before * class_rows + in_classes)
            samples = schedule.first_sample(number) + in_classes
            batch = self.data_target.apply(batch, samples) if self.data_target else batch
            parts.append(replace(batch, group=torch.tensor([self.class_numbers[name] for name in batch.class_names])))
        if len(in_prior):
            batch = self._read(self.prior, size, before * prior_rows + in_prior)
            parts.append(replace(batch, group=torch.full((len(batch),), len(self.class_names))))
        return concatenate(parts)

    def _read(self, reader: Reader, size: PictureSize | None, places: RowIndices) -> Batch:
        """The rows at these places of a reader's stream of one size."""
        order = self._order_of(reader, size)
        if order is None:
            raise ValueError(f"{reader.folder}: no stream of {size}")
        return reader.gather(*order.at(places))

    def _order_of(self, reader: Reader, size: PictureSize | None) -> Order | None:
        return reader.orders[reader.sizes.index(size)]
