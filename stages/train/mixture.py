"""Two streams in one batch: the chosen classes, and records of the distillation cache that keep the rest in place."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import count
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Int

from configs.refusal import Refused
from shards.batch import Batch, concatenate
from shards.reader import Reader
from stages.classes import ClassFile, owner_of_record
from stages.train.data_target import DataTarget

PRIOR_SHARE = 0.3
"""Of each batch, unless told."""
PRIOR = "(prior)"

Rows: TypeAlias = Int[np.ndarray, " n"]


@dataclass(frozen=True)
class Groups:
    """What the journal tells apart: the classes by name, and last the prior."""

    classes: tuple[str, ...]
    of: Mapping[str, int]
    """the number of the class that a record with this class name belongs to"""

    @classmethod
    def of_classes(cls, classes: ClassFile, class_names: Iterable[str]) -> "Groups":
        """Of records with these class names; those that no class owns are never drawn."""
        names = tuple(spec.name for spec in classes.classes)
        owners = {name: owner_of_record(classes, name) for name in class_names}
        return cls(names, {name: names.index(spec.name) for name, spec in owners.items() if spec})

    @property
    def names(self) -> tuple[str, ...]:
        """All of them, by number."""
        return (*self.classes, PRIOR)

    def mark(self, batch: Batch) -> Batch:
        """The rows of classes, each with its number."""
        return replace(batch, group=torch.tensor([self.of[name] for name in batch.class_names]))

    def mark_prior(self, batch: Batch) -> Batch:
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
    data: DataTarget | None = None
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
        streams = [self._of_classes(ours, number), self._of_prior(theirs, number)]
        for rows in zip(*filter(None, streams), strict=True):
            yield concatenate(rows)

    def _of_classes(self, rows: Rows, number: int) -> Iterator[Batch] | None:
        places = _places(self.classes, rows, number)
        return None if places is None else self._taught(places, rows, number)

    def _taught(self, batches: Iterator[Batch], rows: Rows, number: int) -> Iterator[Batch]:
        """The rows of classes as they are learnt; the sample that a row is counts in all batches since the first."""
        size = self.classes.batch_size + self.prior.batch_size
        for first, batch in zip(count(number * size, size), batches, strict=False):
            yield self.groups.mark(batch if self.data is None else self.data.put(batch, first + rows))

    def _of_prior(self, rows: Rows, number: int) -> Iterator[Batch] | None:
        places = _places(self.prior, rows, number)
        return None if places is None else map(self.groups.mark_prior, places)


def _places(reader: Reader, rows: Rows, number: int) -> Iterator[Batch] | None:
    """The same rows of a reader's batches from this one on; None when there are no rows."""
    return reader.read(batch * reader.batch_size + rows for batch in count(number)) if len(rows) else None


def rows_of(batch_size: int, prior_share: float) -> tuple[int, int]:
    """Rows of classes and of prior in a batch; raises `Refused` when either gets none."""
    prior = round(batch_size * prior_share)
    if not 0 < prior < batch_size:
        raise Refused(
            f"prior_share = {prior_share}: gives {prior} of {batch_size} rows to the prior - "
            "both streams need at least one"
        )
    return batch_size - prior, prior
