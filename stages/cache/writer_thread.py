"""Shards are written in a thread of their own, behind the teacher, which goes on with the next batch and shard."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from queue import Full, Queue
from types import TracebackType
from typing import TypeAlias

from shards.record import Record

MAX_QUEUED_BATCHES = 2
"""Batches that may wait to be written: enough that neither side waits for the other's every move."""
PUT_TIMEOUT_SECONDS = 0.2

Write: TypeAlias = Callable[[Iterator[Record]], None]


class ShardAbandoned(Exception):
    """The teacher will not finish the shard that is being written: it must not get its name."""


END = None
BatchQueue: TypeAlias = "Queue[Sequence[Record] | ShardAbandoned | None]"


class WriterThread:
    """Writes one shard after the other; what goes wrong there is raised at the next call, at the latest on leaving."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="scribe")
        self._jobs: list[Future[None]] = []

    def __enter__(self) -> "WriterThread":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True)  # a shard that was handed over whole is finished even then
        if error is None:
            self.check()

    def check(self) -> None:
        """Raise what went wrong behind the teacher's back."""
        over = [job for job in self._jobs if job.done()]
        self._jobs = [job for job in self._jobs if not job.done()]
        for job in over:
            job.result()

    def write_while_made(self, batches: Iterable[Sequence[Record]], write: Write) -> None:
        """Have `write` called with the records of all batches, while they are made; returns when the last one is."""
        handed: BatchQueue = Queue(MAX_QUEUED_BATCHES)
        job = self._thread.submit(write, _iter_queued(handed))
        self._jobs.append(job)
        try:
            for batch in batches:
                self._put(handed, batch)
            self._put(handed, END)
        except BaseException:
            while not job.done():
                with suppress(Full):
                    handed.put(ShardAbandoned(), timeout=PUT_TIMEOUT_SECONDS)
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
