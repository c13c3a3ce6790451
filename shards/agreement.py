"""What a record must agree with: all the others, and the table."""

import numpy as np

from configs.refusal import Refused
from shards.entries import Shard
from shards.layout import FEATURES, PER_DRAW, PER_PROMPT
from shards.record import Record
from shards.table import Table
from shards.tabulate import rows_of

Shapes = dict[str, tuple[int, ...]]


class Seen:
    """What the records so far have been like: all of a cache have the same blocks and shapes, and none comes twice."""

    def __init__(self) -> None:
        self._like: tuple[str, Shapes] | None = None
        self._pictures: dict[tuple[int, str], str] = {}

    def slip(self, record: Record, file: str) -> str | None:
        """How this record does not fit to those before it."""
        key, shapes = f"{record.key} of {file}", _shapes(record)
        other, wanted = self._like = self._like or (key, shapes)
        differs = [name for name in wanted.keys() | shapes.keys() if wanted.get(name) != shapes.get(name)]
        if differs or list(wanted) != list(shapes):
            name = min(differs, default="blocks")
            return f"{name} has shape {shapes.get(name)}, record {other} has {wanted.get(name)}"
        twin = self._pictures.setdefault((record.seed, record.text), key)
        return None if twin == key else f"has the sentence and the seed of record {twin}: the same record twice"


class Rows:
    """The rows of the table that belong to one shard; each column is read once, when it is first asked for."""

    def __init__(self, table: Table, first: int, shard: Shard) -> None:
        self.table, self._shard = table, shard
        self._rows = slice(first, first + shard.draws)
        self._read: dict[str, np.ndarray] = {}

    def differs(self, record: Record, number: int) -> str | None:
        """What the table says otherwise about record `number` of the shard."""
        if record.class_name not in self.table.class_names:
            return f"class {record.class_name} is not in the table"
        if tuple(record.features.by_block) != self.table.blocks:
            return f"has blocks {', '.join(record.features.by_block)}, the table has {', '.join(self.table.blocks)}"
        here = slice(number * len(record.draws), (number + 1) * len(record.draws))
        wanted = rows_of(record, self._shard.split, self.table.class_names.index(record.class_name))
        for name, values in wanted.items():
            try:
                found = self._column(name)[here]
            except (Refused, KeyError) as error:
                return f"the table has no {name}: {error}"
            if found.dtype != values.dtype or not np.array_equal(found, values):
                return f"the table says another {name}"
        return None

    def _column(self, name: str) -> np.ndarray:
        if name not in self._read:
            self._read[name] = self.table.column(name, self._rows)
        return self._read[name]


def _shapes(record: Record) -> Shapes:
    """Name -> shape of each tensor, without the number of draws."""
    named = {name: getattr(record, name).shape for name in PER_PROMPT}
    named |= {name: getattr(record.draws, name).shape[1:] for name in PER_DRAW}
    named |= {f"{FEATURES}{block}": values.shape[1:] for block, values in record.features.by_block.items()}
    return {name: tuple(shape) for name, shape in named.items()}
