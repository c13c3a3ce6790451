"""The torch device that a process computes on, checked before use, and the number of its CPU threads."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from stages.system.refusal import Refused, in_one_line


def device_of(name: str, worker: int = 0) -> torch.device:
    """The device of this name; `auto` is a GPU, worker by worker another one, or else the CPU.

    Raises `Refused` for a device that torch does not know, this machine does not have, or that cannot add two numbers.
    """
    if name != "auto":
        return _parse_device(name)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return _check_device(f"cuda:{worker % torch.cuda.device_count()}")


def devices() -> Iterator[str]:
    """The names of this machine's devices."""
    yield "cpu"
    yield from (f"cuda:{number}" for number in range(torch.cuda.device_count()))
    yield from (f"xpu:{number}" for number in range(torch.xpu.device_count()))
    if torch.backends.mps.is_available():
        yield "mps"


def _parse_device(name: str) -> torch.device:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about types that torch dropped: `_check_device` decides
            device = torch.device(name)
    except (RuntimeError, ValueError) as error:
        raise _refused(name, "torch knows no such device") from error
    if device.type == "meta":
        raise _refused(name, "holds no numbers")
    known = set(devices())
    if device.type in {other.partition(":")[0] for other in known} and (device.index or 0) > 0 and name not in known:
        raise _refused(name, "this machine has none of that number")
    return _check_device(name)


@cache
def _check_device(name: str) -> torch.device:
    """The device, after an addition on it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = float((torch.ones(1, device=name) + 1).sum())
    except Exception as error:  # errors of drivers, or of their absence, have no common class
        raise _refused(name, f"cannot compute here ({in_one_line(error, 120)})") from error
    if result != 2:
        raise _refused(name, f"adds 1 and 1 to {result:g}")
    return torch.device(name)


def _refused(name: str, reason: str) -> Refused:
    return Refused(f"device {name}: {reason} - use auto or {' or '.join(devices())}")


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one CPU thread in this block.

    The number of threads changes the order of sums, and so the last bits of a result. On one, neither the bytes of a
    cache nor a fit depend on the number of cores or of workers that share them.
    """
    previous = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(previous)
