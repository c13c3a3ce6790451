"""A closed terminal is handled like SIGTERM, and its failing writes do not end the run."""

import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Prints during its run, as training does, and writes a file after a signal.
PRINTING = """
import pathlib, sys, time
from stages.system.signals import Interruption
with Interruption() as interruption:
    print("begun", flush=True)
    until = time.monotonic() + 20
    while not interruption.signal_number and time.monotonic() < until:
        time.sleep(0.01)
    print("a line of the journal", flush=True)
    pathlib.Path(sys.argv[1]).write_text(str(interruption.signal_number))
"""
# The tests themselves may run under nohup.
HANGS_UP = "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_DFL)\n"


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """Both ends of a terminal: the one that reads, and the one that programs print to."""
    ends = pty.openpty()
    yield ends
    for end in ends:
        try:
            os.close(end)
        except OSError:
            continue


def test_a_closed_terminal_leaves_time_for_the_step_and_the_checkpoint(
    tmp_path: Path, terminal: tuple[int, int]
) -> None:
    shown, printed = terminal
    words = ["setsid", "--ctty", sys.executable, "-c", HANGS_UP + PRINTING, str(tmp_path / "left")]
    program = subprocess.Popen(words, stdin=printed, stdout=printed, stderr=printed)
    try:
        os.close(printed)
        assert b"begun" in os.read(shown, 100)
        os.close(shown)
        assert program.wait(timeout=30) == 0
        assert (tmp_path / "left").read_text() == str(int(signal.SIGHUP))
    finally:
        program.kill()
        program.wait()


def test_under_nohup_it_goes_on(tmp_path: Path) -> None:
    words = ["nohup", sys.executable, "-c", PRINTING.replace("20", "1"), str(tmp_path / "left")]
    with subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as program:
        try:
            assert program.stdout is not None
            assert program.stdout.readline() == b"begun\n"
            program.send_signal(signal.SIGHUP)
            assert program.wait(timeout=30) == 0
            assert (tmp_path / "left").read_text() == "0"
        finally:
            program.kill()
