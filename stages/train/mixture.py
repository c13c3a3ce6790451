"""Two streams in one batch: the chosen classes, and records of the distillation cache that keep the rest in place."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import numpy as np
from jaxtyping import Int

from configs.refusal import Refused
from shards.batch import Batch, concatenate
from shards.reader import Reader

PRIOR_SHARE = 0.3
"""Of each batch, unless told."""


@dataclass(frozen=True)
class Mixture:
    """Every batch holds the same number of rows of each stream, so its content depends on its number alone.

    The rows of the classes come first, and rank r of `world` takes the rows n with n mod world = r. Both readers count
    the rows of all ranks.
    """

    classes: Reader
    prior: Reader
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
        streams = [_places(self.classes, ours, number), _places(self.prior, theirs, number)]
        for rows in zip(*filter(None, streams), strict=True):
            yield concatenate(rows)


def _places(reader: Reader, rows: Int[np.ndarray, " n"], number: int) -> Iterator[Batch] | None:
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
