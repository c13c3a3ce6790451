"""The data itself as a target: a picture teaches its own velocity eps - x0, under ever fresh noise.

A picture comes with the guidance scale under which it is to be drawn, and the loss lets the student meet eps - x0 under
that guidance: a student whose conditional branch learns what guidance made is guided twice when it is sampled (in the
embedded world its share of right pictures fell from .98 to .57).

Two streams in one batch: the chosen classes, and records of the distillation cache that keep the rest in place.
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
from stages.classes import ClassFile, owner_of_record
from stages.flow.path import LinearPath, interpolate
from stages.flow.timesteps import TimestepDensity
from stages.prompts import derived_seed
from stages.system.refusal import Refused


@dataclass(frozen=True)
class DataTarget:
    """The pictures that teach themselves, by key; a row's noise and time are a function of its sample number alone."""

    x0: Mapping[str, Float[Tensor, "c h w"]]
    guidance: Mapping[str, float]
    """the scale under which each is to be drawn"""
    seed: int
    density: TimestepDensity

    @classmethod
    def from_records(
        cls, records: Iterable[Record], guidance: Mapping[str, float], seed: int, density: TimestepDensity
    ) -> "DataTarget":
        """The pictures of these records (32 KiB each at SD1.5's size), each at its scale, or that which painted it.

        Raises `Refused` naming one with a scale below 1, under which v_cond hardly shows.
        """
        x0: dict[str, Tensor] = {}
        scales: dict[str, float] = {}
        for record in records:
            x0[record.key], scales[record.key] = record.x0, guidance.get(record.key, record.guidance_scale)
            if scales[record.key] < 1:
                raise Refused(
                    f"record {record.key} ({record.text!r}): target is data, but it was painted at guidance "
                    f"{scales[record.key]:.3g} - paint at guidance 1 or above, or let it teach the teacher's velocities"
                )
        return cls(x0, scales, seed, density)

    def apply(self, batch: Batch, samples: Int[np.ndarray, " b"]) -> Batch:
        """The batch with each row of these pictures noised anew; `samples` are the numbers of its rows.

        There x_t = (1 - s) x0 + s eps, v_cond = eps - x0, and `own_guidance` is the picture's. `v_uncond`, `k` and the
        features stay those of the stored state, and count for nothing.
        """
        rows = [row for row, key in enumerate(batch.keys) if key in self.x0]
        if not rows:
            return batch
        drawn = [self._sample_state(int(samples[row]), self.x0[batch.keys[row]].float()) for row in rows]
        s, x_t, v = (torch.stack(column) for column in zip(*drawn, strict=True))
        at, scales = torch.tensor(rows), torch.tensor([self.guidance[batch.keys[row]] for row in rows])
        return replace(
            batch,
            s=batch.s.index_copy(0, at, s.to(batch.s.dtype)),
            x_t=batch.x_t.index_copy(0, at, x_t.to(batch.x_t.dtype)),
            v_cond=batch.v_cond.index_copy(0, at, v.to(batch.v_cond.dtype)),
            own_guidance=torch.zeros(len(batch)).index_copy(0, at, scales),
        )

    def _sample_state(self, sample_number: int, x0: Float[Tensor, "c h w"]) -> tuple[Tensor, Tensor, Tensor]:
        """Time, state and velocity of one sample, drawn on the CPU."""
        generator = torch.Generator().manual_seed(derived_seed("data", self.seed, sample_number))
        s = self.density.sample(1, generator).float()
        eps = torch.randn(x0.shape, generator=generator)
        return s[0], interpolate(LinearPath(), x0[None], eps[None], s)[0], eps - x0


DEFAULT_PRIOR_SHARE = 0.3
"""Of each batch, unless told."""
PRIOR_GROUP = "(prior)"

RowIndices: TypeAlias = Int[np.ndarray, " n"]


@dataclass(frozen=True)
class Groups:
    """What the journal tells apart: the classes by name, and last the prior."""

    classes: tuple[str, ...]
    class_index: Mapping[str, int]
    """the number of the class that a record with this class name belongs to"""

    @classmethod
    def from_classes(cls, classes: ClassFile, class_names: Iterable[str]) -> "Groups":
        """Of records with these class names; those that no class owns are never drawn."""
        names = tuple(spec.name for spec in classes.classes)
        owners = {name: owner_of_record(classes, name) for name in class_names}
        return cls(names, {name: names.index(spec.name) for name, spec in owners.items() if spec})

    @property
    def names(self) -> tuple[str, ...]:
        """All of them, by number."""
        return (*self.classes, PRIOR_GROUP)

    def label_classes(self, batch: Batch) -> Batch:
        """The rows of classes, each with its number."""
        return replace(batch, group=torch.tensor([self.class_index[name] for name in batch.class_names]))

    def label_prior(self, batch: Batch) -> Batch:
        """The rows of the prior, whatever class they are of."""
        return replace(batch, group=torch.full((len(batch),), len(self.classes)))


@dataclass(frozen=True)
class Mixture:
    """Every batch holds the same number of rows of each stream, so its content depends on its number alone.

    The rows of the classes come first, and rank r of `world` takes the rows n with n mod world = r. Both readers count
    the rows of all ranks.
    """

    classes: Reader
    prior: Reader
    groups: Groups
    data_target: DataTarget | None = None
    """the pictures of classes that teach themselves, if any do"""
    rank: int = 0
    world: int = 1

    def batches(self, start_sample: int) -> Iterator[Batch]:
        """This rank's rows of the batches from this sample on, a whole number of batches from the beginning."""
        of_classes, of_prior = self.classes.batch_size, self.prior.batch_size
        number, rest = divmod(start_sample, of_classes + of_prior)
        if rest:
            raise ValueError(f"sample {start_sample} is {rest} rows into a batch")
        mine = np.arange(self.rank, of_classes + of_prior, self.world)
        ours, theirs = mine[mine < of_classes], mine[mine >= of_classes] - of_classes
        streams = [self._class_rows(ours, number), self._prior_rows(theirs, number)]
        for rows in zip(*filter(None, streams), strict=True):
            yield concatenate(rows)

    def _class_rows(self, rows: RowIndices, batch_number: int) -> Iterator[Batch] | None:
        places = _read_rows(self.classes, rows, batch_number)
        return None if places is None else self._label_with_targets(places, rows, batch_number)

    def _label_with_targets(self, batches: Iterator[Batch], rows: RowIndices, batch_number: int) -> Iterator[Batch]:
        """The rows of classes as they are learnt; the sample that a row is counts in all batches since the first."""
        size = self.classes.batch_size + self.prior.batch_size
        for first, batch in zip(count(batch_number * size, size), batches, strict=False):
            yield self.groups.label_classes(
                batch if self.data_target is None else self.data_target.apply(batch, first + rows)
            )

    def _prior_rows(self, rows: RowIndices, batch_number: int) -> Iterator[Batch] | None:
        places = _read_rows(self.prior, rows, batch_number)
        return None if places is None else map(self.groups.label_prior, places)


def _read_rows(reader: Reader, rows: RowIndices, batch_number: int) -> Iterator[Batch] | None:
    """The same rows of a reader's batches from this one on; None when there are no rows."""
    return reader.read_places(batch * reader.batch_size + rows for batch in count(batch_number)) if len(rows) else None


def split_batch_size(batch_size: int, prior_share: float) -> tuple[int, int]:
    """Rows of classes and of prior in a batch; raises `Refused` when either gets none."""
    prior = round(batch_size * prior_share)
    if not 0 < prior < batch_size:
        raise Refused(
            f"prior_share = {prior_share}: gives {prior} of {batch_size} rows to the prior - "
            "both streams need at least one"
        )
    return batch_size - prior, prior
