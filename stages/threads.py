"""How many threads of the CPU compute."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread of the CPU.

    Two threads add up in another order than one, so their number changes the last bits of a result. On one, neither the
    bytes of a cache nor a fit depend on how many cores a machine has or on how many workers share them.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
