"""The settings of a plan for rented GPUs, and its figures: hours, money, bytes, requests, bandwidth."""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, model_validator

from configs.values import Strict
from stages.scale.cards import card_named
from stages.scale.rates import Rates
from stages.system.forecast import duration

GPUS_A_NODE = 8
PART_BYTES = 50 << 20
"""Of a multipart upload, and of a ranged read."""
REQUESTS_OF_A_SHARD = 5
"""Beside its parts: begin and end of the upload, claim, its removal, and the manifest's journal."""
OPTIMIZER_BYTES = 36
"""Read and written for each weight at a step: weight, gradient, two moments, average, in fp32."""
NODE_LINK, NETWORK_LINK = 150e9, 25e9
"""Bytes a second of each GPU to its neighbours, within a node and between nodes; assumed."""


class FleetOptions(Strict):
    """What is planned with, and for."""

    plan: bool = Field(False, description="print the cost and make nothing; of GPUs to rent with gpus, else measured")
    gpus: int | None = Field(None, ge=1, le=100_000, description="with --plan: so many rented GPUs")
    gpu: str | None = Field(None, description="with --plan: their kind, such as h100 or l40s")
    price: float | None = Field(None, ge=0, description="with --plan: the price of one of them for an hour")
    rates: Path | None = Field(None, description="with --plan: the file that benchmarks.gpu wrote on such a card")

    @model_validator(mode="after")
    def _check_fleet(self) -> "FleetOptions":
        given = [name for name in ("gpus", "gpu", "price", "rates") if getattr(self, name) is not None]
        if given and not self.plan:
            raise ValueError(f"{given[0]} {getattr(self, given[0])}: is for a plan - add --plan, or leave it out")
        if self.gpu is not None:
            card_named(self.gpu)
        if given and self.gpus is None:
            raise ValueError(f"{given[0]} {getattr(self, given[0])}: says not how many - add --gpus such as 8")
        if self.gpus is not None and self.gpu is None and self.rates is None:
            raise ValueError(f"gpus {self.gpus}: says not which - add --gpu such as h100, or --rates gpu.json")
        return self

    def fleet(self) -> "Fleet | None":
        """The GPUs to rent; None where none are named."""
        if self.gpus is None:
            return None
        card = None if self.gpu is None else card_named(self.gpu)
        if self.rates is not None:
            return Fleet(self.gpus, Rates.measured(self.rates, card), self.price)
        assert card is not None
        return Fleet(self.gpus, Rates.of_card(card), self.price)


@dataclass(frozen=True)
class Fleet:
    """Rented GPUs."""

    gpus: int
    rates: Rates
    price: float | None
    """of one for an hour; None where it is not known"""

    @property
    def nodes(self) -> int:
        """Machines of up to `GPUS_A_NODE`."""
        return -(-self.gpus // GPUS_A_NODE)

    def lines(self, seconds: float, stored: str, requests: str, bytes_a_node: float) -> list[str]:
        """The figures that both plans have, as text; `bytes_a_node` go through a node's network in all the time."""
        hours = self.gpus * seconds / 3600
        money = "price not given (--price)" if self.price is None else f"{hours * self.price:,.2f}"
        return [
            f"GPUs             {self.gpus} {self.rates.card.name} on {self.nodes} nodes",
            f"time             {duration(seconds)}, {f'{hours:,.1f}' if hours >= 10 else f'{hours:.3g}'} GPU-hours",
            f"money            {money}",
            f"bytes            {stored}",
            f"requests         {requests}",
            f"bandwidth        {bytes_a_node / max(seconds, 1e-9) / 1e6:,.1f} MB/s a node, the mean",
            f"rates            {self.rates.source}",
        ]


@dataclass(frozen=True)
class CachingWork:
    """What is missing of a cache: shards as (prompts, passes of a prompt in operations, bytes of a record)."""

    shards: Sequence[tuple[int, float, float]]
    single_share: float
    """of the operations, those in fp32"""

    def seconds_of(self, operations: float, rates: Rates) -> float:
        """The time of so many operations of the teacher, with what is not the teacher."""
        in_teacher = operations * ((1 - self.single_share) / rates.half + self.single_share / rates.single)
        return in_teacher / rates.teacher_share

    def lines(self, fleet: Fleet) -> list[str]:
        """The plan as text: the GPU that ends last decides, and has whole shards to make."""
        costs = [self.seconds_of(prompts * each, fleet.rates) for prompts, each, _ in self.shards]
        seconds = longest_share(costs, fleet.gpus)
        size = sum(prompts * stored for prompts, _, stored in self.shards)
        requests = sum(upload_requests(prompts * stored) for prompts, _, stored in self.shards)
        prompts, flop = sum(p for p, _, _ in self.shards), sum(p * each for p, each, _ in self.shards)
        idle = 1 - sum(costs) / (seconds * fleet.gpus) if seconds else 0.0
        stored = f"{size:,.0f} ({size / 2**30:,.2f} GiB) in {len(self.shards):,} shards"
        return [
            f"prompts to make  {prompts:,}, {flop / 1e15:,.3g} PFLOP, {self.single_share:.0%} of it in fp32",
            *fleet.lines(seconds, stored, f"{requests:,} writes", size / fleet.nodes),
            f"assumed          no GPU fails; {idle:.1%} of the GPU-hours wait for the last shard (docs/scale.md)",
        ]


@dataclass(frozen=True)
class TrainingWork:
    """A training on a cache."""

    samples: int
    rows: int
    """of a batch of all GPUs together"""
    operations: float
    """of one sample: forward and backward passes of both branches"""
    weights: int
    cache_bytes: int
    cache_shards: int
    cache_states: int
    is_single: bool
    """whether a step is in fp32"""

    def step_seconds(self, fleet: Fleet) -> float:
        """Computing, then moving every weight's numbers, then averaging the gradients of all GPUs in a ring."""
        rate = fleet.rates.single if self.is_single else fleet.rates.training
        computing = self.rows / fleet.gpus * self.operations / rate
        moving = OPTIMIZER_BYTES * self.weights / (fleet.rates.card.bandwidth * 1e9)
        return computing + moving + self.gradient_bytes(fleet) / (NODE_LINK if fleet.nodes == 1 else NETWORK_LINK)

    def gradient_bytes(self, fleet: Fleet) -> float:
        """That each GPU sends at a step."""
        return 2 * (fleet.gpus - 1) / fleet.gpus * 4 * self.weights

    def lines(self, fleet: Fleet) -> list[str]:
        """The plan as text: each node reads the whole cache once, and keeps it."""
        steps, step = -(-self.samples // self.rows), self.step_seconds(fleet)
        parts = math.ceil(self.cache_bytes / self.cache_shards / PART_BYTES)
        reads = self.cache_shards * parts * fleet.nodes
        stored = f"{self.cache_bytes:,} ({self.cache_bytes / 2**30:,.2f} GiB) read by each of {fleet.nodes} nodes"
        first = min(1.0, self.samples / self.cache_states)
        epoch = first * self.cache_states / self.rows * step
        return [
            f"samples          {self.samples:,} in {steps:,} steps of {self.rows} rows, {step:.3g} s a step, "
            f"{self.samples * self.operations / 1e15:,.3g} PFLOP",
            *fleet.lines(steps * step, stored, f"{reads:,} reads", self.cache_bytes),
            f"first epoch      {self.cache_bytes / max(epoch, 1e-9) / 1e6:,.1f} MB/s a node, later ones from its disk",
            f"assumed          no GPU fails; gradients of {self.gradient_bytes(fleet) / 1e9:.2f} GB a step and GPU at "
            f"{(NODE_LINK if fleet.nodes == 1 else NETWORK_LINK) / 1e9:.0f} GB/s, not hidden; without validation and "
            "checkpoints",
        ]


def longest_share(costs: Sequence[float], workers: int) -> float:
    """The cost of the worker that ends last, if each takes the next shard as soon as it is free."""
    shares = [0.0] * workers
    for cost in costs:
        heapq.heapreplace(shares, shares[0] + cost)
    return max(shares)


def upload_requests(size: float) -> int:
    """The requests that one shard of this size takes."""
    return math.ceil(size / PART_BYTES) + REQUESTS_OF_A_SHARD
