"""Where a process computes, and whether it can compute there.

How many threads of the CPU compute.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from stages.system.refusal import Refused, in_one_line


def device_of(name: str, worker: int = 0) -> torch.device:
    """`auto` is a GPU, or else the CPU; several workers of one machine take its GPUs in turn.

    Raises `Refused` for a device that torch does not know, this machine does not have, or that cannot add two numbers.
    """
    if name != "auto":
        return _parse_device(name)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return _check_device(f"cuda:{worker % torch.cuda.device_count()}")


def devices() -> Iterator[str]:
    """The devices of this machine by the names that may be given."""
    yield "cpu"
    yield from (f"cuda:{number}" for number in range(torch.cuda.device_count()))
    yield from (f"xpu:{number}" for number in range(torch.xpu.device_count()))
    if torch.backends.mps.is_available():
        yield "mps"


def _parse_device(name: str) -> torch.device:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of types that torch gave up: the trial says more
            device = torch.device(name)
    except (RuntimeError, ValueError) as error:
        raise _refused(name, "torch knows no such device") from error
    if device.type == "meta":
        raise _refused(name, "holds no numbers")
    known = set(devices())
    if device.type in {one.partition(":")[0] for one in known} and (device.index or 0) > 0 and name not in known:
        raise _refused(name, "this machine has none of that number")
    return _check_device(name)


@cache
def _check_device(name: str) -> torch.device:
    """The device, once it has held a tensor and added to it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            answer = float((torch.ones(1, device=name) + 1).sum())
    except Exception as error:  # what a driver, or its absence, comes up with has no common name
        raise _refused(name, f"cannot compute here ({in_one_line(error, 120)})") from error
    if answer != 2:
        raise _refused(name, f"adds 1 and 1 to {answer:g}")
    return torch.device(name)


def _refused(name: str, why: str) -> Refused:
    return Refused(f"device {name}: {why} - use auto or {' or '.join(devices())}")


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
