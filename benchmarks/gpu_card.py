"""The card: what its maker states, what plain products reach on it, and clocks that do not disturb it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu_report import Budget, RecordFigures
from stages.scale.cards import Card, card_of_device

TERA, GIB = 1e12, 2**30


def peak_of(name: str) -> Card | None:
    """The stated rates of a card; None for one that is not in the table."""
    return card_of_device(name)


def card_name(device: torch.device) -> str:
    """The name of a GPU, or what else computes."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def shares_of_peak(rate: float, dtype: torch.dtype, name: str) -> dict[str, float | str | None]:
    """A rate in operations a second as a share of what the card has for this type.

    In fp32 convolutions of a GPU round to TF32 while other products do not, so the share is between the two.
    """
    peak = peak_of(name)
    if peak is None:
        return {"share_of_peak": f"unknown: {name} is not in the table of cards"}
    if dtype != torch.float32:
        return {"share_of_peak": rate / (peak.half * TERA)}
    tf32 = None if peak.tf32 is None else rate / (peak.tf32 * TERA)
    return {"share_of_tf32_peak": tf32, "share_of_fp32_peak": rate / (peak.single * TERA)}


def synchronize(device: torch.device) -> None:
    """Wait for the pending work of a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def now(device: torch.device) -> float:
    """Seconds, after the pending work of a GPU."""
    synchronize(device)
    return time.perf_counter()


def peak_gib(device: torch.device) -> dict[str, float] | None:
    """The most that tensors took since `reset_peak`, and that the allocator held for them; None on a CPU."""
    if device.type != "cuda":
        return None
    return {
        "allocated": torch.cuda.max_memory_allocated(device) / GIB,
        "reserved": torch.cuda.max_memory_reserved(device) / GIB,
    }


def reset_peak(device: torch.device) -> float | None:
    """Forget the peak; returns the GiB that tensors take now, None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device) / GIB


@dataclass(frozen=True)
class Span:
    """One timed call."""

    label: str
    rows: int
    begin: Any
    end: Any


@dataclass
class DeviceTimer:
    """The time of calls on the device itself, by events in its stream: nothing waits for them before they are read."""

    device: torch.device
    spans: list[Span] = field(default_factory=list)

    @contextmanager
    def span(self, label: str, rows: int) -> Iterator[None]:
        """Time this block, which computes so many rows."""
        begin = self._mark()
        yield
        self.spans.append(Span(label, rows, begin, self._mark()))

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def totals(self, first: int = 0) -> dict[str, tuple[int, float]]:
        """Label -> rows and seconds of the spans from number `first` on."""
        synchronize(self.device)
        totals: dict[str, tuple[int, float]] = {}
        for span in self.spans[first:]:
            is_cuda = self.device.type == "cuda"
            seconds = span.begin.elapsed_time(span.end) / 1000 if is_cuda else span.end - span.begin
            rows, before = totals.get(span.label, (0, 0.0))
            totals[span.label] = rows + span.rows, before + seconds
        return totals


def unet_operations(unet: UNet2DConditionModel, tokens: int) -> int:
    """Operations of one row through a UNet of native size, a multiplication and an addition counting as two.

    Counted on tensors without content, where attention is its two products.
    """
    with torch.device("meta"):
        empty = UNet2DConditionModel.from_config(unet.config).eval()
        side, channels, width = (empty.config[name] for name in ("sample_size", "in_channels", "cross_attention_dim"))
        x, k, cond = torch.zeros(1, channels, side, side), torch.zeros(1), torch.zeros(1, tokens, width)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        empty(x, k, cond)
    return int(counter.get_total_flops())


def describe(world: Any, budget: Budget, record: RecordFigures) -> None:
    """Name, memory and libraries, and the rates of plain products and copies: what the card itself can do here."""
    device, name = world.device, card_name(world.device)
    peak = peak_of(name)
    record(
        {
            "name": name,
            "stated_peak_tflops": {key: getattr(peak, key) for key in ("half", "tf32", "single")}
            if peak
            else f"unknown: {name} is not in the table of cards",
            "torch": torch.__version__,
            "cpu_threads": torch.get_num_threads(),
        }
    )
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        free, total = torch.cuda.mem_get_info(device)
        record(
            {
                "capability": f"{properties.major}.{properties.minor}",
                "multiprocessors": properties.multi_processor_count,
                "memory_gib": total / GIB,
                "free_gib": free / GIB,
                "cuda": torch.version.cuda,
                "cudnn": torch.backends.cudnn.version(),
                "tf32_convolutions": torch.backends.cudnn.allow_tf32,
                "tf32_products": torch.backends.cuda.matmul.allow_tf32,
            }
        )
    side = 256 if world.dry else 8192
    rates = {}
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        budget.check(f"products in {dtype}")
        a = torch.ones(side, side, dtype=dtype, device=device)
        rates[str(dtype).removeprefix("torch.")] = 2 * side**3 / seconds_of(lambda a=a: a @ a, device) / TERA
        record({"measured_products_tflops": dict(rates)})
    budget.check("copies")
    source = torch.ones((1 << 22) if world.dry else (1 << 30), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = seconds_of(lambda: target.copy_(source), device)
    record({"measured_copy_gib_per_second": 2 * source.numel() / seconds / GIB})


def seconds_of(action: Any, device: torch.device, count: int = 10) -> float:
    """Seconds of one call, the mean of several after two that are not timed."""
    for _ in range(2):
        action()
    began = now(device)
    for _ in range(count):
        action()
    return (now(device) - began) / count
