"""Laws of the tie between a process and the one that started it: no worker outlives its launcher, at any moment."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from stages.system.ownership import is_alive
from stages.system.tied import tie_to_parent

SLOW_START = """
import pathlib, sys, time
from stages.system.ownership import process_token
pathlib.Path(sys.argv[1], f"{process_token()}.up").touch()
time.sleep(300)  # as if it still imported something
"""


def await_workers(folder: Path, count: int, seconds: float = 90) -> list[str]:
    """The owners of the workers that are up."""
    deadline = time.monotonic() + seconds
    while len(owners := [path.stem for path in folder.glob("*.up")]) < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return owners


def end(workers: list[str]) -> None:
    for worker in workers:
        if is_alive(worker):
            os.kill(int(worker.partition("-")[0]), signal.SIGKILL)


def gone(workers: list[str], seconds: float = 5) -> bool:
    deadline = time.monotonic() + seconds
    while any(is_alive(worker) for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(is_alive(worker) for worker in workers)


def killed_launcher_takes_along(tmp_path: Path, program: str, count: int) -> bool:
    """Whether the workers that a program starts end with it, which is killed once all of them are up."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path.cwd())])}
    launcher = subprocess.Popen([sys.executable, "-c", program], env=environment, stderr=subprocess.DEVNULL)
    workers: list[str] = []
    try:
        workers = await_workers(tmp_path, count)
        launcher.kill()
        launcher.wait()
        return gone(workers)
    finally:
        launcher.kill()
        launcher.wait()
        end([path.stem for path in tmp_path.glob("*.up")])


def test_a_launcher_that_is_killed_during_the_start_takes_its_processes_along(tmp_path: Path) -> None:
    (tmp_path / "slow_start.py").write_text(SLOW_START)
    program = f"from stages.train.runtime import run_processes, tied_command; f = {str(tmp_path)!r}; "
    assert killed_launcher_takes_along(tmp_path, program + "run_processes(tied_command('slow_start', f), 2, f)", 2)


def test_workers_of_a_cache_end_with_a_parent_that_is_killed_while_they_start(tmp_path: Path) -> None:
    """The job is read after the tie: reading it is what takes long here."""
    (tmp_path / "slow_start.py").write_text(
        "import multiprocessing, pathlib, time\nfrom stages.system.ownership import process_token\n"
        "if multiprocessing.parent_process():\n"
        f"    pathlib.Path({str(tmp_path)!r}, f'{{process_token()}}.up').touch()\n"
        "    time.sleep(300)\ndef opened(number): ...\n"
    )
    program = (
        "import slow_start, time; from stages.cache import local; from stages.cache.fill import FillJob\n"
        "workers = local.start_workers(FillJob(slow_start.opened, []), 2); time.sleep(300)"
    )
    assert killed_launcher_takes_along(tmp_path, program, 2)


@pytest.fixture
def forked() -> Callable[[Callable[[], None]], int]:
    def of(act: Callable[[], None]) -> int:
        """The exit status of a child process that does this."""
        pid = os.fork()
        if pid == 0:
            try:
                act()
            finally:
                os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    return of


def test_a_parent_that_died_before_the_tie_is_noticed(forked: Callable[[Callable[[], None]], int]) -> None:
    assert forked(lambda: tie_to_parent(1 << 22)) == 128 + signal.SIGTERM
    parent = os.getpid()
    assert forked(lambda: tie_to_parent(parent)) == 0


def test_where_the_kernel_reports_nothing_the_parent_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.system.tied._ask_kernel", lambda _number: False)
    parent = os.fork()
    if parent == 0:
        if os.fork() == 0:
            tie_to_parent(os.getppid())
            from stages.system.ownership import process_token

            (tmp_path / f"{process_token()}.up").touch()
            time.sleep(300)
        time.sleep(300)
    workers = await_workers(tmp_path, 1)
    try:
        os.kill(parent, signal.SIGKILL)
        os.waitpid(parent, 0)
        assert gone(workers)
    finally:
        end(workers)
