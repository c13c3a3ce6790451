"""Laws of several processes on this machine: signals reach all of them, and the end of one is the end of all."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.killing import ended, forked
from configs.refusal import Refused
from stages.train.launch import together

RANK = "import os, signal, sys, time, pathlib; rank = int(os.environ['RANK']); here = pathlib.Path(sys.argv[1]); "


def code_of(act: Callable[[], None]) -> int:
    with pytest.raises(SystemExit) as left:
        act()
    return int(str(left.value.code))


def test_each_process_knows_its_rank_and_computes_on_one_thread(tmp_path: Path) -> None:
    together(
        ["-c", RANK + "(here / str(rank)).write_text(os.environ['OMP_NUM_THREADS'])", str(tmp_path)], 2, str(tmp_path)
    )
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["1", "1"]


def test_a_process_that_dies_ends_the_others_and_is_named(tmp_path: Path) -> None:
    words = ["-c", RANK + "os.kill(os.getpid(), signal.SIGKILL) if rank else time.sleep(60)", str(tmp_path)]
    began = time.monotonic()
    with pytest.raises(Refused, match=r"process 1 of 2 was ended by SIGKILL, .* the last checkpoint is whole"):
        together(words, 2, str(tmp_path))
    assert time.monotonic() - began < 30


def test_a_process_that_said_why_is_not_explained_again(tmp_path: Path) -> None:
    assert code_of(lambda: together(["-c", RANK + "sys.exit(2)", str(tmp_path)], 2, str(tmp_path))) == 2


POLITE = RANK + (
    "told = []; signal.signal(signal.SIGTERM, lambda *_: told.append(1)); (here / f'up{rank}').touch()\n"
    "while len(told) < int(sys.argv[2]): time.sleep(0.01)\n"
    "(here / f'left{rank}').write_text(str(len(told))); sys.exit(143)"
)


@pytest.mark.parametrize("signals", [1, 2])
def test_signals_reach_every_process(tmp_path: Path, signals: int) -> None:
    def job() -> None:
        together(["-c", POLITE, str(tmp_path), str(signals)], 2, str(tmp_path))

    launcher = forked(job)
    for number in range(signals):
        while len(list(tmp_path.glob("up*"))) < 2:
            time.sleep(0.01)
        time.sleep(0.3 * number)
        os.kill(launcher, signal.SIGTERM)
    ended(launcher)
    assert [path.read_text() for path in sorted(tmp_path.glob("left*"))] == [str(signals)] * 2
