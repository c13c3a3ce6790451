"""Shards are written in a thread of their own, while the teacher goes on with the next batch and shard."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from queue import Full, Queue
from typing import TypeAlias

from shards.record import Record

MAX_QUEUED_BATCHES = 2
"""Batches that may wait to be written: enough that neither side waits for each step of the other."""
PUT_TIMEOUT_SECONDS = 0.2
END = None


class ShardAbandoned(Exception):
    """The teacher will not finish the shard that is being written: it must not get its name."""


Write: TypeAlias = Callable[[Iterator[Record]], None]
BatchQueue: TypeAlias = "Queue[Sequence[Record] | ShardAbandoned | None]"


class WriterThread:
    """Writes one shard after the other; its errors are raised at the next call, at the latest on leaving."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._jobs: list[Future[None]] = []

    def __enter__(self) -> "WriterThread":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._thread.shutdown(wait=True)  # a shard whose batches are all queued is finished even then
        if error is None:
            self.check()

    def check(self) -> None:
        """Raise the error of a shard that could not be written."""
        done = [job for job in self._jobs if job.done()]
        self._jobs = [job for job in self._jobs if not job.done()]
        for job in done:
            job.result()

    def write_while_made(self, batches: Iterable[Sequence[Record]], write: Write) -> None:
        """Have `write` called with the records of all batches, while they are made; returns when the last one is."""
        queue: BatchQueue = Queue(MAX_QUEUED_BATCHES)
        job = self._thread.submit(write, _iter_queued(queue))
        self._jobs.append(job)
        try:
            for batch in batches:
                self._put(queue, batch)
            self._put(queue, END)
        except BaseException:
            while not job.done():
                with suppress(Full):
                    queue.put(ShardAbandoned(), timeout=PUT_TIMEOUT_SECONDS)
                    break
            raise

    def _put(self, queue: BatchQueue, batch: Sequence[Record] | None) -> None:
        while True:
            self.check()
            with suppress(Full):
                return queue.put(batch, timeout=PUT_TIMEOUT_SECONDS)


def _iter_queued(queue: BatchQueue) -> Iterator[Record]:
    while (batch := queue.get()) is not END:
        if isinstance(batch, ShardAbandoned):
            raise batch
        yield from batch
