"""Prompts -> records, a batch at a time; what cannot be made is told with its reason."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from configs.refusal import Refused
from shards.record import Record
from stages.prompts import Prompt

Make: TypeAlias = Callable[[Sequence[Prompt], Sequence[str]], list[Record]]
"""(prompts, keys) -> one record each."""

Reasons: TypeAlias = list[tuple[str, str]]
"""(key, why) of each prompt that gave no record."""


def batches_of(
    first: int, prompts: Sequence[Prompt], batch_size: int, make: Make, failures: Reasons
) -> Iterator[list[Record]]:
    """The records of one shard, batch by batch; the key is the prompt's number in its split.

    Batches are counted from the shard's first prompt, so a record is asked in the same company whenever it is made.
    """
    for at in range(0, len(prompts), batch_size):
        batch = prompts[at : at + batch_size]
        yield attempt(make, batch, [f"{first + at + i:09d}" for i in range(len(batch))], failures)


def attempt(make: Make, batch: Sequence[Prompt], keys: Sequence[str], failures: Reasons) -> list[Record]:
    """The batch's records; when it cannot be made, one prompt at a time, and the reason of each that fails.

    What fails for every prompt of a batch of several, or for want of memory, is no prompt's fault and is raised.
    """
    try:
        return make(batch, keys)
    except (Refused, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        whole = error
    found: list[Record] = []
    reasons: Reasons = []
    for prompt, key in zip(batch, keys, strict=True):
        try:
            found += make([prompt], [key])
        except (Refused, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            reasons.append((key, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"))
    if not found and len(batch) > 1:
        raise whole
    failures += reasons
    return found


def finite(records: Iterable[Record], failures: Reasons) -> Iterator[Record]:
    """The records without those that hold a number which is none."""
    for record in records:
        bad = next((name for name, values in tensors_of(record) if not values.isfinite().all()), None)
        if bad:
            failures.append((record.key, f"{bad} is not finite"))
        else:
            yield record


def tensors_of(record: Record) -> Iterator[tuple[str, Tensor]]:
    """The record's numbers by name."""
    yield from ((name, getattr(record, name)) for name in ("cond", "x0"))
    yield from ((name, getattr(record.draws, name)) for name in ("s", "x_t", "v_cond", "v_uncond"))
    yield from ((f"features.{block}", values) for block, values in record.features.by_block.items())
