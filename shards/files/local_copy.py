"""How the file of a shard is obtained: it lies in its cache, or is fetched into the bounded copy of a remote one."""

import os
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from stages.system.storage.holders import register_holder
from stages.system.storage.local_copy import (
    Hold,
    delete_stored,
    drop_copy,
    hold_copy,
    limit_bytes,
    stored_size,
)
from stages.system.storage.locations import location_of

FETCHES_AT_ONCE = 4
MAX_ITEMS_AHEAD = 8192

Item = TypeVar("Item")


def is_remote(cache: Path) -> bool:
    """Whether the shards of a cache lie in an object store."""
    return location_of(cache) is not None


def absent_fault(path: Path, size: int) -> str | None:
    """What is wrong with a shard that is not on this machine: nothing where the store has it with this size."""
    stored = stored_size(path)
    if stored is None:
        return "missing"
    return None if stored == size else f"{stored} bytes, manifest says {size}"


@contextmanager
def obtained(path: Path, size: int) -> Iterator[Path]:
    """The path of a shard, which is on this machine while the block runs, unless its store has no such object."""
    hold: Hold | None = None
    with suppress(FileNotFoundError):
        hold = hold_copy(path, size)
    try:
        yield path
    finally:
        if hold is not None:
            hold.release()


def share_bytes(largest: int) -> int:
    """What the shards take that a process may hold, so that all of its training leave room for what is fetched."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(largest, limit_bytes() // processes - FETCHES_AT_ONCE * largest)


def fetch_ahead(
    items: Iterable[Item], shards_of: Callable[[Item], Collection[int]], fetch: Callable[[int], object], most: int
) -> Iterator[Item]:
    """The same items, looked at long before they are yielded: the up to `most` shards of later ones are fetched.

    What a fetch raises is raised again where its shard is read.
    """
    ahead: deque[tuple[Item, Collection[int]]] = deque()
    uses: Counter[int] = Counter()
    remaining = iter(items)
    pool = ThreadPoolExecutor(FETCHES_AT_ONCE, thread_name_prefix="fetch")
    try:
        while True:
            while len(uses) < most and len(ahead) < MAX_ITEMS_AHEAD and (item := next(remaining, None)) is not None:
                shards = shards_of(item)
                for shard in shards:
                    if shard not in uses:
                        pool.submit(fetch, shard)
                uses.update(shards)
                ahead.append((item, shards))
            if not ahead:
                return
            item, shards = ahead.popleft()
            yield item
            uses.subtract(shards)
            for shard in shards:
                if not uses[shard]:
                    del uses[shard]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


__all__ = [
    "absent_fault",
    "delete_stored",
    "drop_copy",
    "fetch_ahead",
    "hold_copy",
    "is_remote",
    "obtained",
    "register_holder",
    "share_bytes",
]
