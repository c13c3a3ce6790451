"""The simulation of machines that are lost, against what can be computed."""

import dataclasses

import numpy as np
import pytest

from benchmarks.scale import SIZES, Node, World, expected_seconds, simulate, table, young_records

WORLD = World(
    prompts=4000,
    gpus=1,
    seconds_a_prompt=1.0,
    bytes_a_prompt=1e6,
    node_hours=0.5,
    start_seconds=60.0,
    object_seconds=2.0,
    request_seconds=0.1,
)


@pytest.mark.parametrize("records", [100, 1000])
@pytest.mark.parametrize("start_seconds", [0.0, 300.0])
def test_a_shard_takes_as_long_as_the_closed_form_says(records: int, start_seconds: float) -> None:
    """Mean of some hundred shards on one machine that lives half an hour, within four standard errors."""
    world = dataclasses.replace(WORLD, prompts=400 * records, start_seconds=start_seconds)
    runs = [simulate(world, records, seed).seconds / 400 for seed in range(20)]
    error = np.std(runs) / np.sqrt(len(runs))
    assert np.mean(runs) == pytest.approx(expected_seconds(world, records), abs=4 * error)


def test_lives_are_exponential_and_begin_after_a_start() -> None:
    node, moment, lives, gaps, before = Node(WORLD, np.random.default_rng(0), 0), 0.0, [], [], 0.0
    for _ in range(4000):
        begin, death = node.alive_at(moment)
        gaps.append(begin - before)
        lives.append(death - begin)
        moment = before = death
    assert gaps[0] == 0
    assert gaps[1:] == pytest.approx([WORLD.start_seconds] * 3999)
    assert np.mean(lives) == pytest.approx(1800, rel=0.07)
    assert np.mean(np.array(lives) > 1800) == pytest.approx(np.exp(-1), abs=0.035)


@pytest.mark.parametrize("records", [30, 250, 5000])
@pytest.mark.parametrize("gpus", [1, 8, 20])
def test_every_second_of_every_gpu_is_accounted_for(records: int, gpus: int) -> None:
    world = dataclasses.replace(WORLD, gpus=gpus)
    run = simulate(world, records, seed=3)
    assert run.useful == world.prompts * world.seconds_a_prompt
    assert run.useful + run.requests + run.lost + run.idle == pytest.approx(run.seconds * gpus)


def test_without_losses_only_requests_and_the_end_cost_anything() -> None:
    world = dataclasses.replace(WORLD, gpus=8, node_hours=1e9)
    run = simulate(world, 500, seed=0)
    assert (run.lost, run.idle) == (0, 0)
    assert run.requests == pytest.approx(8 * world.overhead(500))


def test_the_gpus_of_a_machine_are_lost_together() -> None:
    """Eight shards on one machine take as long as one, on eight machines longer: the last of them decides."""
    world = dataclasses.replace(WORLD, node_hours=0.3)
    alone = [simulate(dataclasses.replace(world, prompts=1000), 1000, seed).seconds for seed in range(20)]
    together = [simulate(dataclasses.replace(world, prompts=8000, gpus=8), 1000, seed) for seed in range(20)]
    apart = [simulate(dataclasses.replace(world, prompts=64_000, gpus=64), 1000, seed).seconds for seed in range(20)]
    assert [run.seconds for run in together] == alone
    assert all(run.idle == 0 for run in together)
    assert np.mean(apart) > 1.5 * np.mean(alone)


def test_the_best_size_is_near_the_closed_form_where_losses_are_rare() -> None:
    world = dataclasses.replace(WORLD, prompts=2_000_000, node_hours=24, start_seconds=0)
    lines, best = table(world, SIZES, runs=3, seed=0)
    nearest = sorted(SIZES, key=lambda size: abs(np.log(size / young_records(world))))[:3]
    assert best in nearest
    assert sum(line.startswith("| **") for line in lines) == 1


def test_the_same_seed_gives_the_same_table() -> None:
    assert table(WORLD, (50, 500), 2, 5) == table(WORLD, (50, 500), 2, 5)
    assert table(WORLD, (50, 500), 2, 5) != table(WORLD, (50, 500), 2, 6)
