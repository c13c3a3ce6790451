"""Where a process computes."""

import torch

from configs.refusal import Refused


def device_of(name: str, worker: int = 0) -> torch.device:
    """`auto` is a GPU, or else the CPU; several workers of one machine take its GPUs in turn.

    Raises `Refused` for a device that torch does not know or this machine does not have.
    """
    if name != "auto":
        return _named(name)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", worker % torch.cuda.device_count())


def _named(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise Refused(f"device {name}: torch knows no such device - use auto, cpu or cuda") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise Refused(f"device {name}: torch finds {torch.cuda.device_count()} GPUs here - use auto or cpu")
    return device
