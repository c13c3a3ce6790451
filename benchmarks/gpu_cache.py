"""Stage one on the card: prompts a second, the teacher's share of the time, its rate, and what the audit sees."""

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.gpu_card import (
    TERA,
    DeviceTimer,
    card_name,
    peak_gib,
    reset_peak,
    shares_of_peak,
    unet_operations,
)
from benchmarks.gpu_report import Budget, BudgetUsed, RecordFigures
from benchmarks.gpu_world import World
from shards.manifest import Manifest
from shards.record import Record
from stages import cache_teacher
from stages.cache import audit
from stages.nets.teacher import FrozenUNet, Teacher

WARM_BATCHES = 2
"""Not counted: libraries choose their kernels, memory is reserved, and a compiler compiles."""
MANY_PROMPTS, MOST_BATCHES, DRY_BATCHES = 2000, 40, 3
AUDITED_RECORDS, AUDIT_SHARE = 4, 0.2
"""The share of the budget that is kept for the audit."""
TEXTS = "text encoder"


@dataclass
class BatchTimes:
    """When each batch of the teacher began and ended on this process's clock, and the device's time in its networks."""

    timer: DeviceTimer
    begins: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    first_spans: list[int] = field(default_factory=list)
    """for each batch the number of its first span of the timer"""

    @property
    def seconds(self) -> list[float]:
        """Of each batch."""
        return [end - begin for begin, end in zip(self.begins, self.ends, strict=True)]


@contextmanager
def timed_batches(
    times: BatchTimes, budget: Budget, record: RecordFigures, most: int, kept_seconds: float
) -> Iterator[None]:
    """Time batches and networks of a cache while it is filled, and end its filling with `BudgetUsed`.

    It ends before the batch that would be one too many, or that would not be done before the last `kept_seconds`.
    """
    make, predict, encode = cache_teacher.make_records, FrozenUNet.predict, Teacher.encode_texts

    def make_timed(teacher: Teacher, prompts: Sequence[Any], *rest: Any) -> list[Record]:
        if len(times.ends) >= most:
            raise BudgetUsed(f"{most} batches are enough")
        # The shortest one, because the first may have compiled something.
        budget.check("another batch", kept_seconds + min(times.seconds, default=0.0))
        times.first_spans.append(len(times.timer.spans))
        times.begins.append(time.perf_counter())
        records = make(teacher, prompts, *rest)  # on the CPU, so the device is done
        times.ends.append(time.perf_counter())
        record({"batch_seconds": times.seconds})
        return records

    def predict_timed(network: FrozenUNet, x: torch.Tensor, *rest: Any) -> Any:
        with times.timer.span(str(network.dtype).removeprefix("torch."), 2 * len(x)):
            return predict(network, x, *rest)

    def encode_timed(teacher: Teacher, texts: Sequence[str]) -> torch.Tensor:
        with times.timer.span(TEXTS, len(texts)):
            return encode(teacher, texts)

    with ExitStack() as patches:
        patches.enter_context(patch.object(cache_teacher, "make_records", make_timed))
        patches.enter_context(patch.object(FrozenUNet, "predict", predict_timed))
        patches.enter_context(patch.object(Teacher, "encode_texts", encode_timed))
        yield


def make_small(world: World, budget: Budget, record: RecordFigures) -> None:
    """The whole cache that is trained from: shards, table and all."""
    opened, config = world.fresh_teacher(), world.cache_config("small", world.small_cache_options)
    times = BatchTimes(DeviceTimer(world.device))
    began = time.perf_counter()
    with timed_batches(times, budget, record, MANY_PROMPTS, 0.0):
        job = cache_teacher.open_job(config, opened)
        record({"seconds_to_open": time.perf_counter() - began})
        cache_teacher.make_cache(job)
    manifest = Manifest.open(world.cache)
    record(
        {
            "seconds": time.perf_counter() - began,
            "records": sum(shard.records for shard in manifest.shards),
            "failed_prompts": len(manifest.failures),
            "bytes": sum(shard.bytes for shard in manifest.shards),
        }
    )


def half_eager(world: World, budget: Budget, record: RecordFigures) -> None:
    """fp16, the steps where errors count most in fp32."""
    measure(world, budget, record, "float16", compiled=False)


def single_eager(world: World, budget: Budget, record: RecordFigures) -> None:
    """fp32 alone."""
    measure(world, budget, record, "float32", compiled=False)


def half_compiled(world: World, budget: Budget, record: RecordFigures) -> None:
    """fp16 with its fp32 steps, compiled."""
    measure(world, budget, record, "float16", compiled=True)


def single_compiled(world: World, budget: Budget, record: RecordFigures) -> None:
    """fp32 alone, compiled."""
    measure(world, budget, record, "float32", compiled=True)


def measure(world: World, budget: Budget, record: RecordFigures, dtype: str, compiled: bool) -> None:
    """Fill a cache for as long as the budget lasts, then audit some of what it holds."""
    name = f"{dtype}-{'compiled' if compiled else 'eager'}"
    own = ("--dtype", dtype, "--compile", str(compiled).lower(), "--count", str(MANY_PROMPTS))
    opened = world.fresh_teacher()
    reset_peak(world.device)
    job = cache_teacher.open_job(world.cache_config(name, [*world.small_cache_options, *own]), opened)
    record({"precision": job.teacher.precision, "compiled": compiled})
    times = BatchTimes(DeviceTimer(world.device))
    most = DRY_BATCHES if world.dry else MOST_BATCHES
    try:
        with compiler_of(world), timed_batches(times, budget, record, most, AUDIT_SHARE * budget.seconds):
            cache_teacher.make_cache(job)
    except BudgetUsed as end:
        record({"ended_by": str(end)})
    record(
        {
            **speeds(job, times, world),
            "failed_prompts": len(Manifest.open(job.writer.folder).failures),
            "peak_gib": peak_gib(world.device),
        }
    )
    if len(times.ends) <= WARM_BATCHES:
        raise BudgetUsed(f"budget of {budget.seconds:.0f} s used up by the {WARM_BATCHES} batches that are not counted")
    audit_some(world, job, budget, record)


@contextmanager
def compiler_of(world: World) -> Iterator[None]:
    """The compiler on a card; in a dry run what is compiled runs as it is, since compilation takes minutes."""
    if not world.dry:
        yield
        return
    torch.compiler.set_stance("force_eager")
    try:
        yield
    finally:
        torch.compiler.set_stance("default")


def speeds(job: cache_teacher.CacheJob, times: BatchTimes, world: World) -> dict[str, Any]:
    """Prompts a second and the networks' part of it, over the batches after those that warm up."""
    counted = len(times.ends) - WARM_BATCHES
    if counted < 1:
        return {}
    seconds = times.ends[-1] - times.ends[WARM_BATCHES - 1]
    totals = times.timer.totals(times.first_spans[WARM_BATCHES])
    parts = job.teacher.components
    each, name = unet_operations(parts.unet, parts.tokenizer.model_max_length), card_name(world.device)
    networks: dict[str, Any] = {}
    for label, (rows, spent) in totals.items():
        networks[label] = {"rows": rows, "seconds": spent}
        if label != TEXTS:
            rate = each * rows / spent
            networks[label] |= {"tflops": rate / TERA, **shares_of_peak(rate, getattr(torch, label), name)}
    return {
        "prompts_per_second": counted * job.config.render.batch_size / seconds,
        "batch_size": job.config.render.batch_size,
        "counted_batches": counted,
        "share_in_the_teacher": sum(spent for _, spent in totals.values()) / seconds,
        "operations_of_a_row": each,
        "networks": networks,
    }


def audit_some(world: World, job: cache_teacher.CacheJob, budget: Budget, record: RecordFigures) -> None:
    """Audit records of the cache by the teacher that made it, in batches of another size."""
    manifest, worst = Manifest.open(job.writer.folder), defaultdict[str, tuple[float, float, float]](lambda: (0, 0, 0))
    states, is_rough = audit.recorded_states(manifest), world.device.type == "cuda"
    audited = 0
    with compiler_of(world):
        for file, one in audit.sample(job.writer.folder, manifest, AUDITED_RECORDS, 0):
            budget.check("the audit of another record")
            for compared in audit.audit_record(job.teacher, one, file, is_rough, states).comparisons:
                quantity = compared.quantity.split(".")[0]
                found = (compared.error_ratio, compared.error, compared.tolerance)
                worst[quantity] = max(worst[quantity], found)
            audited += 1
            record({"audit": audit_figures(audited, worst)})


def audit_figures(audited: int, worst: dict[str, tuple[float, float, float]]) -> dict[str, Any]:
    """The largest error of each quantity: over its tolerance, and both."""
    names = ("of_tolerance", "error", "tolerance")
    return {
        "records": audited,
        "largest": {quantity: dict(zip(names, values, strict=True)) for quantity, values in worst.items()},
    }
