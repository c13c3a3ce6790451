"""Where a process computes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def device_of(name: str, worker: int = 0) -> torch.device:
    """`auto` is a GPU, or else the CPU; several workers of one machine take its GPUs in turn."""
    if name != "auto":
        return torch.device(name)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", worker % torch.cuda.device_count())


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread of the CPU.

    Two threads add up in another order than one, so their number changes the last bits of an answer. On one, the bytes
    of a cache depend neither on how many cores a machine has nor on how many workers share them; more cores are used
    by more workers.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
