"""Unexpected errors: one line on the terminal, and all of it in a report file."""

import errno
import os
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from stages.__main__ import memory_hint, run_folder
from stages.system.ending import run_to_exit_code
from stages.system.refusal import Refused

Fails = Callable[..., tuple[int, str]]


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary folder of this test."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def fails(temporary: Path, capsys: pytest.CaptureFixture[str]) -> Fails:
    """fails(error, words, folder): a command that raises; its exit code and what it printed."""

    def end(error: BaseException, words: tuple[str, ...] = ("distill",), folder: Path | None = None) -> tuple[int, str]:
        def act() -> int:
            raise error

        capsys.readouterr()
        return run_to_exit_code(act, words, lambda: folder, memory_hint(words)), capsys.readouterr().err

    return end


def reports(folder: Path) -> list[str]:
    return [path.read_text() for path in sorted(folder.glob("sollune-error-*.txt"))]


def test_an_unexpected_error_is_one_line_and_whole_in_the_run_folder(
    fails: Fails, tmp_path: Path, temporary: Path
) -> None:
    code, printed = fails(ZeroDivisionError("division\nby zero"), ("distill", "--run", str(tmp_path)), tmp_path)
    (whole,) = reports(tmp_path)
    assert code == 1
    assert len(printed.splitlines()) == 1
    assert printed.startswith("sollune: ZeroDivisionError: division by zero - ")
    assert str(next(tmp_path.glob("sollune-error-*"))) in printed
    assert "Traceback (most recent call last)" in whole
    assert "raise error" in whole
    assert f"'--run' '{tmp_path}'" in whole
    assert f"Python {sys.version.split()[0]}" in whole
    assert reports(temporary) == []


def test_the_causes_of_an_error_are_written_too(fails: Fails, temporary: Path) -> None:
    error = KeyError("second")
    error.__cause__ = ValueError("first")
    fails(error)
    (whole,) = reports(temporary)
    assert "ValueError: first" in whole


@pytest.mark.parametrize("folder", ["missing", "file"])
def test_without_a_run_folder_that_takes_it_the_temporary_one_does(
    fails: Fails, tmp_path: Path, temporary: Path, folder: str
) -> None:
    (tmp_path / "file").touch()
    code, printed = fails(KeyError("x"), ("distill",), tmp_path / folder)
    assert code == 1
    assert str(temporary) in printed
    assert len(reports(temporary)) == 1


def test_where_no_file_can_be_written_standard_error_gets_all(
    fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    code, printed = fails(KeyError("x"))
    assert code == 1
    assert "Traceback (most recent call last)" in printed
    assert printed.splitlines()[-1].startswith("sollune: KeyError: 'x' - ")
    assert "stands above" in printed.splitlines()[-1]


def test_secrets_reach_neither_the_file_nor_the_terminal(
    fails: Fails, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "very-own-word")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    words = (
        "publish",
        "--token",
        "spoken-aloud",
        "--hub-secret=another-one",
        "https://me:hush@host/x",
        "hf_AbCdEf012345",
    )
    _, printed = fails(RuntimeError("refused very-own-word and hf_ZzZzZz999999 by 0123456789abcdef"), words)
    (whole,) = reports(temporary)
    for secret in ("very-own", "0123456789abcdef", "spoken-aloud", "another-one", "hush", "AbCdEf", "ZzZzZz"):
        assert secret not in printed
        assert secret not in whole
    assert "publish" in whole
    assert "host/x" in whole


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
@pytest.mark.parametrize(
    ("command", "remedy"),
    [
        ("distill", "train.batch_size"),
        ("finetune-classes", "render.batch_size"),
        ("cache-teacher", "render.batch_size"),
        ("sample", "less at once"),
    ],
)
def test_out_of_memory_is_refused_with_what_takes_less(
    fails: Fails, temporary: Path, error: BaseException, command: str, remedy: str
) -> None:
    code, printed = fails(error, (command,))
    assert code == 1
    assert printed.startswith("sollune: out of memory (")
    assert remedy in printed
    assert len(printed.splitlines()) == 1
    assert len(reports(temporary)) == 1


def test_endless_recursion_is_one_line(fails: Fails, temporary: Path) -> None:
    def deeper() -> int:
        return deeper() + 1

    code = run_to_exit_code(deeper, ["sample"])
    assert code == 1
    assert "RecursionError" in reports(temporary)[0]


def test_leaving_and_interrupting_keep_their_codes(fails: Fails, temporary: Path) -> None:
    with pytest.raises(SystemExit) as left:
        fails(SystemExit(143))
    assert left.value.code == 143
    assert fails(KeyboardInterrupt()) == (130, "sollune: interrupted - the same command goes on from here\n")
    assert fails(Refused("a: b - c")) == (2, "sollune: a: b - c\n")
    assert reports(temporary) == []


@pytest.mark.parametrize(
    "number", [errno.EACCES, errno.EISDIR, errno.ENOENT, errno.ENAMETOOLONG, errno.ELOOP, errno.EIO]
)
def test_a_file_that_cannot_be_opened_is_the_users(fails: Fails, temporary: Path, number: int) -> None:
    code, printed = fails(OSError(number, os.strerror(number), "runs/a.json"))
    assert code == 2
    assert printed.startswith(f"sollune: runs/a.json: cannot be opened or written ({os.strerror(number)}) - ")
    assert reports(temporary) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE])
def test_a_disk_error_without_a_file_is_reported(fails: Fails, number: int) -> None:
    code, printed = fails(OSError(number, os.strerror(number)))
    assert code == 2
    assert os.strerror(number) in printed
    assert " - " in printed


def test_what_is_no_file_of_the_users_is_not_foreseen(fails: Fails, temporary: Path) -> None:
    installed = str(Path(sysconfig.get_paths()["purelib"]) / "torch" / "gone.so")
    for error in (
        OSError(errno.ENOENT, "gone", installed),
        ConnectionResetError(errno.ECONNRESET, "reset"),
        OSError("x"),
    ):
        code, printed = fails(error)
        assert code == 1
        assert len(printed.splitlines()) == 1
    assert len(reports(temporary)) == 3


def test_a_line_is_one_line_whatever_it_holds(fails: Fails) -> None:
    _, printed = fails(Refused("a\x1b[31m: red\u2028and\x0b\rmore - way out\nb: second - too"))
    assert printed == "sollune: a\\x1b[31m: red\\u2028and\\x0b\\rmore - way out\nsollune: b: second - too\n"


def test_several_processes_of_a_run_write_one_file_and_one_line(
    fails: Fails, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "abc")
    first, second = fails(KeyError("x")), fails(ValueError("y"))
    assert (first[0], len(first[1].splitlines())) == (1, 1)
    assert second == (1, "")
    (whole,) = reports(temporary)
    assert whole.count("Traceback") == 2


def test_several_processes_of_a_run_refuse_once(fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for rank in "012":
        (tmp_path / "attempt" / rank).mkdir(parents=True)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "attempt" / rank / "error.json"))
        results.append(fails(Refused("a: b - c")))
    assert results == [(2, "sollune: a: b - c\n"), (2, ""), (2, "")]
    assert fails(Refused("another: b - c"))[1] != ""


def test_a_thread_that_fails_prints_no_traceback(temporary: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def act() -> int:
        thread = threading.Thread(target=lambda: {}["gone"])
        thread.start()
        thread.join()
        return 0

    earlier = threading.excepthook
    assert run_to_exit_code(act, ["sample"]) == 0
    printed = capsys.readouterr().err
    assert len(printed.splitlines()) == 1
    assert printed.startswith("sollune: KeyError: 'gone' - ")
    assert len(reports(temporary)) == 1
    assert threading.excepthook is earlier


def test_the_run_folder_is_found_among_the_words(tmp_path: Path) -> None:
    run, model = tmp_path / "run", tmp_path / "model"
    for folder in (run, model):
        folder.mkdir()
    (run / "origin.json").touch()
    (model / "model_index.json").touch()
    assert run_folder(["--run", str(model)], []) == model
    assert run_folder([f"--run={run}"], []) == run
    assert run_folder([str(model), "a sentence", str(run)], []) == run
    assert run_folder([str(model), "x" * 5000, "a\0b"], []) is None
    assert run_folder(["--run", str(tmp_path / "none")], []) is None
    assert run_folder(["--config", "a.yaml"], [run]) == run


def test_a_real_command_ends_so(tmp_path: Path) -> None:
    program = (
        "import sys, stages.upkeep\n"
        "from stages.__main__ import main\n"
        "def broken(words): raise LookupError('an unexpected error')\n"
        "stages.upkeep.main = broken\n"
        "sys.exit(main(['shards', 'verify', sys.argv[1]]))\n"
    )
    (tmp_path / "cache").mkdir()
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "LookupError: an unexpected error" in done.stderr
    assert "an unexpected error" in reports(tmp_path)[0]
