"""Batches made ahead of their use, in threads, and handed over in order."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Asked = TypeVar("Asked")
Made = TypeVar("Made")

AHEAD_PER_WORKER = 2


def ahead(make: Callable[[Asked], Made], asked: Iterable[Asked], workers: int) -> Iterator[Made]:
    """`make` of each thing asked for, in their order; an error comes where its result would have come.

    Up to two results for each worker wait to be fetched; no worker makes nothing ahead.
    """
    if workers == 0:
        yield from map(make, asked)
        return
    remaining = iter(asked)
    waiting: deque[Future[Made]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="reader")
    try:
        while True:
            while len(waiting) < AHEAD_PER_WORKER * workers:
                try:
                    waiting.append(pool.submit(make, next(remaining)))
                except StopIteration:
                    break
            if not waiting:
                return
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
