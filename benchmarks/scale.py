"""The size of a shard that costs least on machines that are lost at random moments: a simulation, and its table.

    python -m benchmarks.scale [--seconds-a-prompt 0.48] [--node-hours 24] [--prompts 1000000] [--gpus 32] [--seed 0]
    python -m benchmarks.scale --example [--gpu h100] [--price 2.5]     # what --plan prints for SD1.5's size

A worker makes whole shards, one after the other. A machine lives for an exponentially distributed time and takes its
GPUs' unfinished shards with it; it is replaced after a while, and its shards begin again from the first prompt. Each
shard costs its requests, and each new machine its start. Nothing else is lost. Closed forms: `expected_seconds`.
"""

import argparse
import heapq
import math
from collections import deque
from dataclasses import dataclass

import numpy as np

from stages.scale.cards import card_named
from stages.scale.fleet import GPUS_A_NODE, CachingWork, Fleet, TrainingWork, upload_requests
from stages.scale.rates import BRANCHES, OPERATIONS_OF_A_STATE, Rates


@dataclass(frozen=True)
class World:
    """What the size of a shard has no influence on."""

    prompts: int
    gpus: int
    seconds_a_prompt: float
    bytes_a_prompt: float
    node_hours: float
    """mean life of a machine"""
    start_seconds: float
    """from the loss of a machine until its successor computes"""
    object_seconds: float
    """that a worker waits for each shard: claim, end of the upload, manifest"""
    request_seconds: float
    """that each request takes beyond that"""

    def overhead(self, records: int) -> float:
        """Seconds that a shard of so many records costs beside its prompts."""
        return self.object_seconds + self.request_seconds * upload_requests(records * self.bytes_a_prompt)

    def shard_seconds(self, records: int) -> float:
        """Seconds of a shard that nothing interrupts."""
        return records * self.seconds_a_prompt + self.overhead(records)


@dataclass(frozen=True)
class Outcome:
    """One simulated run, in seconds of GPUs; shares are of the time that the prompts alone take."""

    useful: float
    requests: float
    """overhead of the shards that were finished"""
    lost: float
    """work of the shards that went down with their machines, and the starts of the machines after them"""
    idle: float
    """GPUs that wait for the last shard"""
    seconds: float
    """from start to end"""

    def shares(self) -> tuple[float, float, float, float]:
        """Requests, lost work, waiting, and all of them."""
        parts = (self.requests / self.useful, self.lost / self.useful, self.idle / self.useful)
        return (*parts, sum(parts))


def simulate(world: World, records: int, seed: int) -> Outcome:
    """One run: each machine's lives are drawn from its own generator, so that sizes are compared on the same losses."""
    waiting = deque([records] * (world.prompts // records) + ([rest] if (rest := world.prompts % records) else []))
    nodes = [
        Node(world, np.random.default_rng([seed, number]), number) for number in range(-(-world.gpus // GPUS_A_NODE))
    ]
    free = [(0.0, gpu, 0) for gpu in range(world.gpus)]  # and the records of the shard that was lost there
    lost = finished = overhead = 0.0
    ends = [0.0] * world.gpus
    while free:
        now, gpu, size = heapq.heappop(free)
        if not size and not waiting:
            continue
        size = size or waiting.popleft()
        begin, death = nodes[gpu // GPUS_A_NODE].alive_at(now)
        end = begin + world.shard_seconds(size)
        lost += begin - now
        if end <= death:
            overhead, finished, ends[gpu] = overhead + world.overhead(size), finished + size, end
            heapq.heappush(free, (end, gpu, 0))
        else:
            lost += death - begin
            heapq.heappush(free, (death, gpu, size))
    last = max(ends)
    return Outcome(finished * world.seconds_a_prompt, overhead, lost, sum(last - end for end in ends), last)


class Node:
    """The lives of one place for a machine: each is as long as chance will, and the next begins after a start."""

    def __init__(self, world: World, generator: np.random.Generator, number: int) -> None:
        self._world, self._generator, self.number = world, generator, number
        self._lives = [(0.0, self._length())]

    def _length(self) -> float:
        return float(self._generator.exponential(self._world.node_hours * 3600))

    def alive_at(self, moment: float) -> tuple[float, float]:
        """The first moment from this one on at which the machine computes, and the end of that life."""
        while self._lives[-1][1] <= moment:
            begin = self._lives[-1][1] + self._world.start_seconds
            self._lives.append((begin, begin + self._length()))
        begin, death = next(life for life in self._lives if life[1] > moment)
        return max(begin, moment), death


def expected_seconds(world: World, records: int) -> float:
    """Of one shard on one GPU, from its begin to its end, through all losses: (1 / lambda + R) (e^(lambda T) - 1).

    T is the time of the shard, lambda the rate of losses, R the start of the next machine.
    """
    mean = world.node_hours * 3600
    return (mean + world.start_seconds) * math.expm1(world.shard_seconds(records) / mean)


def young_records(world: World) -> float:
    """The size that costs least where losses are rare and the end does not count: T = sqrt(2 overhead / lambda)."""
    overhead = world.object_seconds + world.request_seconds * upload_requests(0)
    return math.sqrt(2 * overhead * world.node_hours * 3600) / world.seconds_a_prompt


SIZES = (25, 50, 100, 150, 250, 350, 500, 700, 1000, 1500, 2500, 5000)


def table(world: World, sizes: tuple[int, ...], runs: int, seed: int) -> tuple[list[str], int]:
    """The rows, each the mean of several runs, and the size that costs least."""
    means = {}
    for size in sizes:
        outcomes = [simulate(world, size, seed + run) for run in range(runs)]
        hours = float(np.mean([outcome.seconds for outcome in outcomes])) / 3600
        means[size] = (*np.mean([outcome.shares() for outcome in outcomes], axis=0).tolist(), hours)
    best = min(means, key=lambda size: means[size][3])
    lines = [
        "| records | minutes a shard | requests | lost | waiting at the end | overhead | hours |",
        "|---|---|---|---|---|---|---|",
    ]
    for size, (requests, lost, idle, whole, hours) in means.items():
        name = f"**{size}**" if size == best else str(size)
        minutes = world.shard_seconds(size) / 60
        cells = (name, f"{minutes:.1f}", *(f"{share:.2%}" for share in (requests, lost, idle, whole)), f"{hours:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines, best


def example(prompts: int, gpus: int, gpu: str, price: float, bytes_a_prompt: float) -> list[str]:
    """Both plans at SD1.5's size: 28 steps and two renoised states a prompt, four passes over the states."""
    import torch

    from benchmarks.full_size import unet
    from benchmarks.gpu_card import unet_operations

    with torch.device("meta"):
        network = unet()
    row, weights = unet_operations(network, 77), sum(value.numel() for value in network.parameters())
    fleet = Fleet(gpus, Rates.of_card(card_named(gpu)), price)
    shards = [(500, BRANCHES * 30.0 * row, bytes_a_prompt)] * (prompts // 500)
    size, states = round(prompts * bytes_a_prompt), 6 * prompts
    operations = OPERATIONS_OF_A_STATE * row
    training = TrainingWork(4 * states, 16 * gpus, operations, weights, size, len(shards), states, False)
    return ["cache-teacher", *CachingWork(shards, 0.3).lines(fleet), "", "distill", *training.lines(fleet)]


def main() -> None:
    """Print the table, its best size, and the closed form's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=1_000_000)
    parser.add_argument("--gpus", type=int, default=32)
    parser.add_argument("--seconds-a-prompt", type=float, default=0.48)
    parser.add_argument("--bytes-a-prompt", type=float, default=844e3)
    parser.add_argument("--node-hours", type=float, default=24.0)
    parser.add_argument("--start-seconds", type=float, default=300.0)
    parser.add_argument("--object-seconds", type=float, default=1.0)
    parser.add_argument("--request-seconds", type=float, default=0.1)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--example", action="store_true")
    parser.add_argument("--gpu", default="h100")
    parser.add_argument("--price", type=float, default=2.5)
    args = vars(parser.parse_args())
    gpu, price = args.pop("gpu"), args.pop("price")
    if args.pop("example"):
        print("\n".join(example(args["prompts"], args["gpus"], gpu, price, args["bytes_a_prompt"])))
        return
    runs, seed = args.pop("runs"), args.pop("seed")
    world = World(**args)
    lines, best = table(world, SIZES, runs, seed)
    print("\n".join(lines))
    print(f"\nbest of these: {best} records; closed form for rare losses and no end: {young_records(world):.0f}")


if __name__ == "__main__":
    main()
