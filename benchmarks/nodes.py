"""Losing nodes of a Ray cluster while they fill a cache: `python -m benchmarks.nodes [--scenes kill drain driver]`.

A cluster of two nodes of one CPU, in separate processes on loopback, makes a cache of the embedded teacher with
`cache-teacher --cluster ray:ADDRESS`. In a scene, at a moment that its seed chooses,

kill    SIGKILL ends every process of a node; with an odd seed another node joins afterwards
drain   SIGTERM ends the raylet of a node, as before a pre-emption
driver  SIGKILL ends the command, and the same command is given again

With --forged the records cost nothing but a moment, and no network is loaded.

Printed is, for each scene, whether the cache has the bytes of one that was made without Ray, how many prompts were
computed more than once, and how many of those were not lost with a process.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, TypeAlias

import psutil

from benchmarks import forge
from benchmarks.killing import read_files
from configs.load import load
from configs.values import PictureSize
from shards.manifest import Recipe
from shards.reader import Reader
from shards.record import SPLITS, Record
from shards.table import write_table
from shards.writer import CacheWriter
from stages.cache.engines import worker_starter
from stages.cache.fill import FillJob, RecordMaker, ShardTask, tasks_of
from stages.cache.fleet import fill_by_many
from stages.cache.sizes import RenderSizes
from stages.prompts import Prompt
from stages.system.ownership import is_alive, process_token

SCENES = ("kill", "drain", "driver")
OBJECT_STORE_BYTES = 100 * 2**20
PER_SHARD, HELD_OUT = 5, 2
SIZE = PictureSize(16, 16)
RECIPE = Recipe(identity={"steps": 2})
FORGING_SECONDS = 0.3
DEADLINE_SECONDS = 240.0
POLL_SECONDS = 0.02


# In the command and its workers
def drive(run: Path, count: int, address: str, log: Path, forged: bool) -> None:
    """Fill a cache on a cluster, or without an address in this process; the workers list what they compute."""
    (drive_forged if forged else drive_teacher)(run, count, address, log)


def drive_teacher(run: Path, count: int, address: str, log: Path) -> None:
    """`cache-teacher` with the embedded teacher."""
    from stages import cache_teacher  # with the networks, which a forged job does without

    words = ["--run", str(run), "--count", str(count), "--validation-count", str(HELD_OUT), "--render.batch-size", "1"]
    words += ["--render.records-per-shard", str(PER_SHARD), "--render.states.steps", "8"]
    if address:
        words += ["--cluster", f"ray:{address}", "--workers", "2"]
        cache_teacher.open_worker = partial(open_recording, cache_teacher.open_worker, log)  # type: ignore[assignment]
    cache_teacher.run(load(cache_teacher.Config, "cache_teacher", [Path("configs/tiny.yaml")], words))


def drive_forged(run: Path, count: int, address: str, log: Path) -> None:
    """The same with records that cost nothing but a moment."""
    cache, tasks = run / "cache", forged_tasks(count)
    job = FillJob(partial(open_recording, open_forged, log, cache), tasks)
    if address:
        fill_by_many(CacheWriter(cache, RECIPE), job, {SIZE: 1000}, worker_starter(f"ray:{address}", 2))
    else:
        job.run(0)
    write_table(cache)


def forged_tasks(count: int) -> list[ShardTask]:
    """The shards of a forged job."""
    prompts = [Prompt(f"star {number}", "star", number) for number in range(count)]
    held_out = [Prompt(f"held out {number}", "star", number) for number in range(HELD_OUT)]
    return tasks_of({"train": prompts, "validation": held_out}, PER_SHARD, 1, RenderSizes(SIZE))


def open_forged(cache: Path, _number: int) -> tuple[CacheWriter, RecordMaker]:
    """The cache and a maker of tiny records."""

    def make(prompts: Sequence[Prompt], keys: Sequence[str], _size: PictureSize) -> list[Record]:
        time.sleep(FORGING_SECONDS)
        return [replace(forge.record(int(key)), text=prompt.text) for prompt, key in zip(prompts, keys, strict=True)]

    return CacheWriter(cache, RECIPE), make


def open_recording(
    open_worker: Callable[..., tuple[CacheWriter, RecordMaker]], log: Path, *arguments: Any
) -> tuple[CacheWriter, RecordMaker]:
    """What `open_worker` opens; it appends the prompts that it computes to a file named by its process."""
    writer, make = open_worker(*arguments)

    def recording(prompts: Sequence[Prompt], keys: Sequence[str], size: PictureSize) -> list[Record]:
        records = make(prompts, keys, size)
        with open(log / process_token(), "a", encoding="utf-8") as file:
            file.writelines(f"{json.dumps(f'{record.key} {record.text}')}\n" for record in records)
        return records

    return writer, recording


# The cluster
class Nodes:
    """A head node of one CPU, on which the command runs, and others that can be lost."""

    def __init__(self, folder: Path) -> None:
        (folder / "ray").mkdir(parents=True)
        os.environ.update(RAY_TMPDIR=str(folder), RAY_USAGE_STATS_ENABLED="0")
        from ray.cluster_utils import Cluster

        options = {"num_cpus": 1, "object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": False}
        self._options = options
        self._cluster: Any = Cluster(initialize_head=True, head_node_args=options)
        self.address: str = self._cluster.address

    def add(self) -> Any:
        """Another node of one CPU."""
        return self._cluster.add_node(**self._options)

    def raylet_of(self, node: Any) -> int:
        """The pid of a node's raylet, whose children are its workers."""
        return int(node.all_processes["raylet"][0].process.pid)

    def processes_of(self, node: Any) -> list[int]:
        """The pids of all processes of a node."""
        own = [info.process.pid for infos in node.all_processes.values() for info in infos]
        return list(dict.fromkeys(pid for parent in own for pid in (parent, *children_of(parent))))

    def remove(self, node: Any) -> None:
        """Forget a node whose raylet is dead, and end what is left of it."""
        self._cluster.remove_node(node, allow_graceful=False)

    def shut_down(self) -> None:
        """End every node."""
        self._cluster.shutdown()


def children_of(pid: int) -> list[int]:
    """The pids of all descendants."""
    with suppress(psutil.NoSuchProcess):
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    return []


@contextmanager
def nodes_in(folder: Path) -> Iterator[Nodes]:
    """A cluster that ends with the block, whatever happens in it; every process by its own pid."""
    nodes = Nodes(folder)
    started = set(children_of(os.getpid()))
    try:
        yield nodes
    finally:
        started |= set(children_of(os.getpid()))
        nodes.shut_down()
        kill_all(started)


# A scene
@dataclass(frozen=True)
class Loss:
    """What a scene showed."""

    scene: str
    seed: int
    prompts: int
    made_before: int
    """prompts in finished shards at the loss"""
    computed: int
    twice: int
    """prompts that were computed more than once"""
    lost: int
    """prompts that dead processes had computed, and had not finished a shard of"""
    needless: int
    """prompts that were computed more than once and not lost"""
    same_bytes: bool
    seconds: float

    def holds(self) -> bool:
        """Whether nothing was lost but work in hand, and nothing done twice but what was lost."""
        return self.same_bytes and self.needless == 0 and self.computed == self.prompts + self.twice

    def row(self) -> str:
        """A row of the table."""
        cells = (self.scene, self.seed, self.prompts, self.made_before, self.computed, self.lost, self.twice)
        return "| " + " | ".join(map(str, (*cells, self.needless, self.same_bytes, f"{self.seconds:.0f} s"))) + " |"


HEADER = (
    "| scene | seed | prompts | in shards at the loss | computed | lost with a process | computed twice "
    "| of those not lost | bytes as without Ray | seconds |\n|---|---|---|---|---|---|---|---|---|---|"
)


def play(scene: str, seed: int, start: "Start", folder: Path, nodes: Nodes, alone: Path) -> Loss:
    """Make a cache with a loss in the middle; raises `RuntimeError` when it cannot be made."""
    run, log = folder / "run", folder / "log"
    log.mkdir(parents=True)
    random, began = Random(seed), time.monotonic()
    shard_of = shards_by_prompt(alone)
    prompts = len(shard_of)
    moment = random.randint(prompts // 6, prompts * 2 // 3)
    node = nodes.add()
    command = start(run, nodes.address, log)
    try:
        doomed = await_work(command, log, moment, None if scene == "driver" else partial(nodes.processes_of, node))
        if scene == "kill":
            kill_all(nodes.processes_of(node))
        elif scene == "drain":
            os.kill(nodes.raylet_of(node), signal.SIGTERM)
        else:
            command.kill()
            command.wait()
        await_dead(doomed)
        finished = finished_shards(run)
        made_before = sum(name in finished for name in shard_of.values())
        if scene == "driver":
            command = start(run, nodes.address, log)
        else:
            nodes.remove(node)
            node = nodes.add() if seed % 2 else None
        refuse_failure(command, run)
    finally:
        command.kill()
        command.wait()
    if node is not None:
        nodes.remove(node)

    computed = Counter(name for token in log.iterdir() for name in names_in(token))
    twice = {name for name, times in computed.items() if times > 1}
    lost = {name for token in doomed for name in names_in(log / token) if shard_of[name] not in finished}
    same = read_files(run / "cache") == read_files(alone)
    spent = time.monotonic() - began
    return Loss(
        scene, seed, prompts, made_before, computed.total(), len(twice), len(lost), len(twice - lost), same, spent
    )


Start: TypeAlias = "Callable[[Path, str, Path], subprocess.Popen[bytes]]"
"""(run folder, address, folder of the lists) -> the command that makes its cache."""


def start_command(count: int, forged: bool, run: Path, address: str, log: Path) -> "subprocess.Popen[bytes]":
    """The command, in a process of its own."""
    program = "import sys; from pathlib import Path; from benchmarks import nodes; "
    program += f"nodes.drive(Path(sys.argv[1]), {count}, sys.argv[2], Path(sys.argv[3]), {forged})"
    with open(run.with_name("output"), "ab") as output:
        words = [sys.executable, "-c", program, str(run), address, str(log)]
        return subprocess.Popen(words, stdout=output, stderr=output)


def refuse_failure(command: "subprocess.Popen[bytes]", run: Path) -> None:
    """Raise `RuntimeError`, with the last lines of its output, unless the command succeeds in time."""
    code = command.wait(timeout=DEADLINE_SECONDS)
    if code:
        lines = run.with_name("output").read_text(encoding="utf-8").splitlines()
        raise RuntimeError(f"{run}: the command ended with code {code}: " + "\n".join(lines[-20:]))


def await_work(
    command: "subprocess.Popen[bytes]", log: Path, moment: int, pids: Callable[[], list[int]] | None
) -> set[str]:
    """Wait until so many prompts are computed, and one of them by a process with one of these pids.

    Returns the living workers, by their tokens; those of these pids alone, where some are given.
    """
    deadline = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < deadline:
        if command.poll() is not None:
            raise RuntimeError("the command ended before anything was lost - take more prompts")
        chosen = pids() if pids else None
        tokens = {token.name for token in log.iterdir() if is_alive(token.name)}
        tokens = {token for token in tokens if chosen is None or int(token.partition("-")[0]) in chosen}
        if tokens and sum(len(names_in(token)) for token in log.iterdir()) >= moment:
            return tokens
        time.sleep(POLL_SECONDS)
    raise RuntimeError(f"no prompt {moment} within {DEADLINE_SECONDS:.0f} s")


def await_dead(tokens: set[str]) -> None:
    """Wait until these processes live no more."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while any(is_alive(token) for token in tokens):
        if time.monotonic() > deadline:
            raise RuntimeError(f"{tokens}: live on")
        time.sleep(POLL_SECONDS)


def kill_all(pids: Iterable[int]) -> None:
    """SIGKILL for each of these processes that still lives."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def names_in(file: Path) -> list[str]:
    """The prompts that a worker computed; the last line may be half written."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if line[-1] == "\n"]


def finished_shards(run: Path) -> set[str]:
    """The shards that are entered in the journal."""
    return {path.stem for path in (run / "cache" / "journal").glob("*.json")}


def shards_by_prompt(cache: Path) -> dict[str, str]:
    """Name of each prompt of a finished cache -> the shard that it belongs to."""
    return {
        f"{record.key} {record.text}": f"{split}-{int(record.key) // PER_SHARD:06d}"
        for split in SPLITS
        for record in Reader(cache, split).records(split)
    }


def main() -> int:
    """0 when every scene left the same bytes and did nothing twice but what was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", nargs="+", choices=SCENES, default=["kill"], help="default: kill")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)), help="default: 0 1 2 3 4")
    parser.add_argument("--count", type=int, default=60, help="training prompts (default: 60)")
    parser.add_argument("--forged", action="store_true", help="without a teacher")
    args = parser.parse_args()
    losses = []
    with tempfile.TemporaryDirectory(prefix="n-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        start = partial(start_command, args.count, args.forged)
        refuse_failure(start(folder / "alone", "", folder), folder / "alone")
        with nodes_in(folder / "ray") as nodes:
            print(f"\n{HEADER}", flush=True)
            for scene in args.scenes:
                for seed in args.seeds:
                    losses.append(
                        play(scene, seed, start, folder / f"{scene}{seed}", nodes, folder / "alone" / "cache")
                    )
                    print(losses[-1].row(), flush=True)
    return 0 if all(loss.holds() for loss in losses) else 1


if __name__ == "__main__":
    raise SystemExit(main())
