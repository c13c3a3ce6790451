"""Several processes on this machine: signals reach all of them, and the end of one ends all."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from stages.system.refusal import Refused
from stages.train.runtime import run_processes

RANK = "import os, signal, sys, time, pathlib; rank = int(os.environ['RANK']); here = pathlib.Path(sys.argv[1]); "


def code_of(act: Callable[[], None]) -> int:
    with pytest.raises(SystemExit) as left:
        act()
    return int(str(left.value.code))


def test_each_process_has_its_rank_and_computes_on_one_thread(tmp_path: Path) -> None:
    run_processes(
        ["-c", RANK + "(here / str(rank)).write_text(os.environ['OMP_NUM_THREADS'])", str(tmp_path)], 2, str(tmp_path)
    )
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["1", "1"]


def test_a_process_that_dies_ends_the_others_and_is_named(tmp_path: Path) -> None:
    words = ["-c", RANK + "os.kill(os.getpid(), signal.SIGKILL) if rank else time.sleep(60)", str(tmp_path)]
    began = time.monotonic()
    with pytest.raises(Refused, match=r"process 1 of 2 was ended by SIGKILL, .* the last checkpoint is whole"):
        run_processes(words, 2, str(tmp_path))
    assert time.monotonic() - began < 30


def test_a_refusal_of_a_process_is_not_reported_twice(tmp_path: Path) -> None:
    assert code_of(lambda: run_processes(["-c", RANK + "sys.exit(2)", str(tmp_path)], 2, str(tmp_path))) == 2


def test_an_unexpected_error_of_a_process_is_not_reported_twice(tmp_path: Path) -> None:
    words = ["-c", RANK + "sys.exit(1 - rank or 1)", str(tmp_path)]
    assert code_of(lambda: run_processes(words, 2, str(tmp_path))) == 1


WAITING = RANK + (
    "received = []; signal.signal(signal.SIGTERM, lambda *_: received.append(1)); (here / f'up{rank}').touch()\n"
    "while len(received) < int(sys.argv[2]): time.sleep(0.01)\n"
    "(here / f'left{rank}').write_text(str(len(received))); sys.exit(143)"
)


def test_signals_reach_every_process(tmp_path: Path) -> None:
    launchers = []
    for signals in (1, 2):
        folder = tmp_path / str(signals)
        folder.mkdir()
        words = ["-c", WAITING, str(folder), str(signals)]
        program = f"from stages.train.runtime import run_processes; run_processes({words!r}, 2, {str(folder)!r})"
        launchers.append(subprocess.Popen([sys.executable, "-c", program]))
    await_all(tmp_path, "*/up*", 4)
    for launcher in launchers:
        launcher.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    launchers[1].send_signal(signal.SIGTERM)
    assert [launcher.wait(timeout=60) for launcher in launchers] == [128 + signal.SIGTERM] * 2
    assert [path.read_text() for path in sorted(tmp_path.glob("*/left*"))] == ["1", "1", "2", "2"]


def await_all(folder: Path, pattern: str, count: int) -> None:
    deadline = time.monotonic() + 60
    while len(list(folder.glob(pattern))) < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)
