"""One distillation by 1, 2, 4, 2 and 1 processes, ended by signals in between: `python -m benchmarks.elastic`.

The commands are those of the documentation: `distill`, `distill --processes 2`, torchrun with four processes, and two
agents of torchrun as on two machines, one of which is killed: the other goes on alone in the same run. Every process
lists the samples that it makes steps of. Printed is what each group did, and whether the samples, as they were trained
last, are those of one process in its order.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from safetensors.torch import load_file

DEADLINE_SECONDS = 600.0
POLL_SECONDS = 0.02
BATCH = 4
CACHE = ["--count", "10", "--validation-count", "4", "--render.records-per-shard", "5", "--render.states.steps", "4"]
TRAIN = ["--train.batch-size", str(BATCH), "--train.checkpoint-every-samples", "12", "--train.keep.last", "9"]
TRAIN += ["--train.journal-every-samples", "16", "--david.fusion.formula", "static", "--validation.states", "0"]
TRAIN += ["--grid.sampler.steps", "2", "--train.optimizer.warmup-samples", "8", "--device", "cpu"]


def record(log: Path, words: Sequence[str]) -> int:
    """The command `sollune`, each process of which appends to a file of its own what it has made a step of."""
    from stages.__main__ import main as sollune
    from stages.train import runtime
    from stages.train.step import TrainingStep

    true_step, true_tie = TrainingStep.__call__, runtime.tied_command

    def recording(step: TrainingStep, batch: Any, wait: float) -> Any:
        before, rank, world = step.state.samples, step.runtime.rank, step.runtime.world
        result = true_step(step, batch, wait)
        rows = enumerate(zip(batch.keys, batch.state_index.tolist(), strict=True))
        lines = [json.dumps([time.time(), world, before + rank + i * world, *row]) for i, row in rows]
        with open(log / str(os.getpid()), "a", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in lines))
        return result

    TrainingStep.__call__ = recording  # type: ignore[method-assign]
    # The processes of --processes are to record too.
    runtime.tied_command = lambda _, *rest: true_tie("benchmarks.elastic", "record", str(log), *rest)
    return sollune(list(words))


@dataclass(frozen=True)
class Step:
    """A sample that a process trained on."""

    time: float
    world: int
    number: int
    key: str
    state: int


def steps_in(log: Path) -> list[Step]:
    """What all processes recorded, in the order of time; half-written lines are left out."""
    lines = [line for path in log.iterdir() for line in path.read_text(encoding="utf-8").splitlines(keepends=True)]
    return sorted((Step(*json.loads(line)) for line in lines if line[-1] == "\n"), key=lambda step: step.time)


def start(launcher: Sequence[str], log: Path, run: Path, samples: int, *options: str) -> "subprocess.Popen[bytes]":
    """A training under a launcher."""
    # Without the two dashes torchrun takes --run for a beginning of options of its own.
    module = ["-m", *(["--"] if launcher else []), "benchmarks.elastic"]
    words = [sys.executable, *launcher, *module, "record", str(log), "distill"]
    words += ["--config", "configs/tiny.yaml", "--run", str(run), "--train.max-samples", str(samples), *TRAIN, *options]
    with open(log.with_name("output"), "ab") as output:
        return subprocess.Popen(words, stdout=output, stderr=output)


def torchrun(*options: str) -> list[str]:
    """The launcher of torch."""
    return ["-m", "torch.distributed.run", *options]


def await_samples(log: Path, moment: int, jobs: Sequence["subprocess.Popen[bytes]"]) -> None:
    """Wait until a sample of this number was trained on."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while max((step.number for step in steps_in(log)), default=0) < moment:
        if time.monotonic() > deadline or any(job.poll() not in (None, 0) for job in jobs):
            tail = log.with_name("output").read_text(encoding="utf-8").splitlines()[-20:]
            raise RuntimeError(f"sample {moment} was not reached: " + "\n".join(tail))
        time.sleep(POLL_SECONDS)


def await_listener(port: int, job: "subprocess.Popen[bytes]") -> None:
    """Wait until the job, or what it started, accepts connections at this port."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        if time.monotonic() > deadline or job.poll() is not None:
            raise RuntimeError(f"nothing listens at port {port}")
        time.sleep(POLL_SECONDS)


def end_by(job: "subprocess.Popen[bytes]", number: signal.Signals) -> None:
    """Send a signal: SIGTERM to the command alone, SIGKILL to all of its processes, as when a machine is gone."""
    family = [job.pid] if number == signal.SIGTERM else family_of(job.pid)
    for pid in family:
        if psutil.pid_exists(pid):
            os.kill(pid, number)
    job.wait(timeout=DEADLINE_SECONDS)


def family_of(pid: int) -> list[int]:
    """A process and its descendants."""
    return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]


def train_elastically(run: Path, log: Path, samples: int) -> None:
    """Train by one process, two, four, two agents, and the one that is left."""
    fifth = samples // 5
    endings = [
        ([], (), signal.SIGKILL),
        ([], ("--processes", "2"), signal.SIGTERM),
        (torchrun("--standalone", "--nproc-per-node", "4"), (), signal.SIGKILL),
    ]
    for number, (launcher, options, ending) in enumerate(endings, 1):
        job = start(launcher, log, run, samples, *options)
        try:
            await_samples(log, number * fifth, [job])
            end_by(job, ending)
        finally:
            if job.poll() is None:
                end_by(job, signal.SIGKILL)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = torchrun(
        *("--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "3", "--local-addr", "127.0.0.1"),
        *("--rdzv-id", "run", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"),
        *("--rdzv-conf", "last_call_timeout=10,keep_alive_interval=1,keep_alive_max_attempt=5"),
    )
    agents: list[subprocess.Popen[bytes]] = []
    try:
        agents.append(start(words, log, run, samples))
        await_listener(port, agents[0])
        agents.append(start(words, log, run, samples))
        await_samples(log, 4 * fifth, agents)
        # The store of the rendezvous is held by the agent that was there first: a machine that must stay.
        end_by(agents[1], signal.SIGKILL)
        if code := agents[0].wait(timeout=DEADLINE_SECONDS):
            tail = log.with_name("output").read_text(encoding="utf-8").splitlines()[-30:]
            raise RuntimeError(f"the agent that was left ended with code {code}: " + "\n".join(tail))
    finally:
        for agent in agents:
            if agent.poll() is None:
                end_by(agent, signal.SIGKILL)


def groups_of(steps: Sequence[Step]) -> list[list[Step]]:
    """The steps of each group of processes: one ends where the number of processes changes."""
    groups: list[list[Step]] = []
    for step in steps:
        if not groups or groups[-1][-1].world != step.world:
            groups.append([])
        groups[-1].append(step)
    return groups


def main() -> int:
    """0 when the samples are those of one process, in its order, and the weights too up to rounding."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=140, help="samples of the training (default: 140)")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # with all that it started
    with tempfile.TemporaryDirectory(prefix="elastic-") as name:
        folder = Path(name)
        words = ["cache-teacher", "--config", "configs/tiny.yaml", "--run", str(folder / "run"), *CACHE]
        subprocess.run([sys.executable, "-m", "stages", *words], check=True, capture_output=True)
        for run in ("one", "many"):
            (folder / run / "log").mkdir(parents=True)
            (folder / run / "cache").symlink_to(folder / "run" / "cache")
        one, many = folder / "one", folder / "many"
        if start([], one / "log", one, args.samples).wait(timeout=DEADLINE_SECONDS):
            raise RuntimeError((one / "output").read_text(encoding="utf-8")[-2000:])
        train_elastically(many, many / "log", args.samples)

        expected = {step.number: (step.key, step.state) for step in steps_in(one / "log")}
        steps = steps_in(many / "log")
        print("| processes | first sample | last sample |\n|---|---|---|")
        for group in groups_of(steps):
            numbers = sorted(step.number for step in group)
            print(f"| {group[0].world} | {numbers[0]} | {numbers[-1]} |")
        trained = {step.number: (step.key, step.state) for step in steps}  # of each number, the last in time
        ends = [
            load_file(max((run / "distill" / "checkpoints").glob("0*")) / "student.safetensors") for run in (one, many)
        ]
        difference = max(float((value - ends[1][name]).abs().max()) for name, value in ends[0].items())
        same = sorted(trained.items()) == sorted(expected.items())
        epoch = 10 * 6
        whole = [
            set(Counter(trained[n] for n in range(first, first + epoch)).values()) == {1}
            for first in range(0, args.samples - epoch + 1, epoch)
        ]
        redone = len(steps) - len(trained)
        print(
            f"\n{len(trained)} samples; as by one process, in its order: {same}; each of an epoch once: {all(whole)} "
            f"({len(whole)} epochs); trained again after a loss: {redone}; "
            f"largest difference of a weight {difference:.1e}"
        )
    return 0 if same and all(whole) and len(trained) == args.samples else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["record"]:
        raise SystemExit(record(Path(sys.argv[2]), sys.argv[3:]))
    raise SystemExit(main())
