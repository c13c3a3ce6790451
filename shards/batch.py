"""Batches: rows for training, one state of one record each."""

from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from configs.values import PictureSize
from shards.record import (
    FEATURES,
    LATENTS,
    NOT_PER_STATE,
    PER_LANDING,
    ROW_FIELDS,
    STATE_FIELDS,
    Record,
    RecordHeader,
    tensors_of,
)

Item = TypeVar("Item")
Result = TypeVar("Result")
PREFETCH_PER_WORKER = 2
LATENT_FIELDS = (*(STATE_FIELDS[name] for name in LATENTS), "landing_x", "x0")
TRAJECTORY_FIELDS = ("landing_x", "landing_s", "guidance_scale", "trajectory")
"""The fields of a batch that are there only where it was read with landings."""


@dataclass(frozen=True)
class Batch:
    """b rows of pictures of one size; `state_index` is the row's place among the states of its record."""

    keys: tuple[str, ...]
    texts: tuple[str, ...]
    class_names: tuple[str, ...]
    cond: Float[Tensor, "b L d"]
    x_s: Float[Tensor, "b c h w"]
    v_cond: Float[Tensor, "b c h w"]
    v_uncond: Float[Tensor, "b c h w"]
    s: Float[Tensor, " b"]
    k: Int[Tensor, " b"]
    features: Mapping[str, Float[Tensor, "b n_b"]]
    state_index: Int[Tensor, " b"]
    own_guidance: Float[Tensor, " b"] | None = None
    """float32; where `v_cond` is the picture's own velocity, the guidance scale under which it is the target, at least
    1; 0 where `v_cond` is the teacher's; None where all are"""
    group: Int[Tensor, " b"] | None = None
    """the group under which the journal reports each row; None where it reports all rows together"""
    size: PictureSize | None = None
    """of the pictures, in pixels; None where the cache does not tell it"""
    landing_x: Float[Tensor, "b m+1 c h w"] | None = None
    """the record's landings (m, none in older schemas), and x0 as the last one; None, as what follows, unless the rows
    were read with landings"""
    landing_s: Float[Tensor, "b m+1"] | None = None
    """float32; the last one is 0"""
    guidance_scale: Float[Tensor, " b"] | None = None
    """float32; of the sampling that gave the trajectory"""
    trajectory: Bool[Tensor, " b"] | None = None
    """whether the row's own state lies on the trajectory"""
    x0: Float[Tensor, "b c h w"] | None = None
    """the record's picture; None unless the rows were read with it, and without landings, which hold it"""

    def __len__(self) -> int:
        return len(self.keys)

    def rows(self, selection: slice) -> "Batch":
        """Some of the rows."""
        return self._map(lambda _, values: values[selection])

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "Batch":
        """The same rows on a device; times stay float32, because a time does not survive half precision."""

        def moved(name: str, values: Any) -> Any:
            if not isinstance(values, Tensor):
                return values
            # As stored, and cast over there: a cast here would leave pinned memory and double the bytes on the way.
            there = values.to(device, non_blocking=True)
            return there.to(dtype) if name in ("cond", "features", *LATENT_FIELDS) else there

        return self._map(moved)

    def _map(self, change: Callable[[str, Any], Any]) -> "Batch":
        """A batch of `change(name, values)` for each field that is not None, and for the features of each block."""
        whole = ("features", "size")  # not a value for each row
        present = {name: values for name, values in vars(self).items() if name not in whole and values is not None}
        return replace(
            self,
            **{name: change(name, values) for name, values in present.items()},
            features={block: change("features", values) for block, values in self.features.items()},
        )


class Labels(NamedTuple):
    """What a record has beside its tensors."""

    key: str
    text: str
    class_name: str
    guidance_scale: float


def collate(
    records: Sequence[Record], state_indices: Sequence[int], *, landings: bool = False, x0: bool = False
) -> Batch:
    """Row i is state `state_indices[i]` of `records[i]`, which have pictures of one size.

    `landings` and `x0`: with theirs.
    """
    rows = list(zip([tensors_of(record) for record in records], state_indices, strict=True))
    return batch_of(
        records,
        {
            name: torch.stack([tensors[name] if name in NOT_PER_STATE else tensors[name][i] for tensors, i in rows])
            for name in row_names(records[0].features.by_block, landings, x0, tensors_of(records[0]))
        },
        torch.tensor(list(state_indices), dtype=torch.int64),
        records[0].size,
    )


def concatenate(batches: Sequence[Batch]) -> Batch:
    """The rows of all batches, one after the other; they must have the same size and blocks, and all groups or none.

    Raises `ValueError` for batches of different sizes, and where some have landings and others not.
    """
    if len(sizes := {batch.size for batch in batches}) > 1:
        raise ValueError(f"batches of {len(sizes)} sizes: {', '.join(map(str, sizes))}")

    if len({batch.landing_x is None for batch in batches}) > 1:
        raise ValueError("batches with landings and without")

    def joined(values: list[Any]) -> Any:
        return torch.cat(values) if isinstance(values[0], Tensor) else tuple(chain.from_iterable(values))

    names = {field.name for field in fields(Batch)} - {"features", "own_guidance", "group", "size"}
    if batches[0].landing_x is None:
        names -= {*TRAJECTORY_FIELDS}
    if any(batch.x0 is None for batch in batches):
        names -= {"x0"}
    own = [torch.zeros(len(batch)) if batch.own_guidance is None else batch.own_guidance for batch in batches]
    return Batch(
        **{name: joined([getattr(batch, name) for batch in batches]) for name in names},
        features={block: joined([batch.features[block] for batch in batches]) for block in batches[0].features},
        own_guidance=None if all(batch.own_guidance is None for batch in batches) else joined(own),
        group=None if batches[0].group is None else joined([batch.group for batch in batches]),
        size=batches[0].size,
    )


def row_names(blocks: Iterable[str], landings: bool, x0: bool, stored: Container[str]) -> tuple[str, ...]:
    """The `stored` tensors that a row of a batch has, or, for landings, is made of."""
    of_trajectory = (*(name for name in PER_LANDING if name in stored), "x0", "trajectory")
    more = of_trajectory if landings else ("x0",) if x0 else ()
    return ("cond", *ROW_FIELDS, *(f"{FEATURES}{block}" for block in blocks), *more)


def batch_of(
    records: Sequence[Record | RecordHeader | Labels],
    tensors: Mapping[str, Tensor],
    state_index: Int[Tensor, " b"],
    size: PictureSize | None,
) -> Batch:
    """The batch of these records, of the tensors that `_row_names` lists."""
    return Batch(
        keys=tuple(record.key for record in records),
        texts=tuple(record.text for record in records),
        class_names=tuple(record.class_name for record in records),
        cond=tensors["cond"],
        **{STATE_FIELDS[name]: tensors[name] for name in ROW_FIELDS},
        features={name.removeprefix(FEATURES): tensors[name] for name in tensors if name.startswith(FEATURES)},
        state_index=state_index,
        size=size,
        **(_trajectory_fields(records, tensors) if "trajectory" in tensors else {"x0": tensors.get("x0")}),
    )


def _trajectory_fields(
    records: Sequence[Record | RecordHeader | Labels], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """`TRAJECTORY_FIELDS` of a batch: the landings with x0 behind them, in pinned memory where they are."""
    x0 = tensors["x0"][:, None]
    landings, s = tensors.get("landing_x", x0[:, :0]), tensors.get("landing_s", torch.zeros(len(x0), 0))
    shape = len(landings), landings.shape[1] + 1, *landings.shape[2:]
    out = torch.empty(shape, dtype=x0.dtype, pin_memory=x0.is_pinned())
    return {
        "landing_x": torch.cat([landings, x0], dim=1, out=out),
        "landing_s": torch.cat([s, torch.zeros(len(s), 1)], dim=1),
        "guidance_scale": torch.tensor([record.guidance_scale for record in records], dtype=torch.float32),
        "trajectory": tensors["trajectory"],
    }


def map_ahead(make: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """`make` of each item, in order; an error is raised where its result would have come.

    Up to two results for each worker wait to be fetched; without workers each is made when it is needed.
    """
    if workers == 0:
        yield from map(make, items)
        return
    remaining = iter(items)
    waiting: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="reader")
    try:
        while True:
            while len(waiting) < PREFETCH_PER_WORKER * workers:
                try:
                    waiting.append(pool.submit(make, next(remaining)))
                except StopIteration:
                    break
            if not waiting:
                return
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
