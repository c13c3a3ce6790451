"""Where a process computes."""

import torch


def device_of(name: str, worker: int = 0) -> torch.device:
    """`auto` is a GPU, or else the CPU; several workers of one machine take its GPUs in turn."""
    if name != "auto":
        return torch.device(name)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", worker % torch.cuda.device_count())
