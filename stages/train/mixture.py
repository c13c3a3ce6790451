"""Two streams in one batch: the chosen classes, and records of the distillation cache that keep the rest in place."""

from collections.abc import Iterator
from dataclasses import dataclass

from configs.refusal import Refused
from shards.batch import Batch, concatenate
from shards.reader import Reader

PRIOR_SHARE = 0.3
"""Of each batch, unless told."""


@dataclass(frozen=True)
class Mixture:
    """Every batch holds the same number of rows of each stream, so its content depends on its number alone."""

    classes: Reader
    prior: Reader

    def batches(self, start_sample: int) -> Iterator[Batch]:
        """The batches from this sample on, a whole number of batches from the beginning."""
        number, rest = divmod(start_sample, self.classes.batch_size + self.prior.batch_size)
        if rest:
            raise ValueError(f"sample {start_sample} is {rest} rows into a batch")
        classes = self.classes.batches(number * self.classes.batch_size)
        prior = self.prior.batches(number * self.prior.batch_size)
        for rows in zip(classes, prior, strict=True):
            yield concatenate(rows)


def rows_of(batch_size: int, prior_share: float) -> tuple[int, int]:
    """Rows of classes and of prior in a batch; raises `Refused` when either gets none."""
    prior = round(batch_size * prior_share)
    if not 0 < prior < batch_size:
        raise Refused(
            f"prior_share = {prior_share}: gives {prior} of {batch_size} rows to the prior - "
            "both streams need at least one"
        )
    return batch_size - prior, prior
