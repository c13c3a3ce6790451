"""Broken input through the real command line: refused in one line, with nothing changed on the disk."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from stages import __main__ as cli

TEACHER = Path("stages/tiny/model")


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder with its sha256, every link with its target, every folder by its name."""
    entries = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            entries[name] = f"-> {path.readlink()}"
        elif path.is_file():
            entries[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            entries[name] = "folder" if path.is_dir() else "special"
    return entries


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """refused(words, *named): run the words; assert exit code 2, one line with all `named`, a remedy, no file changed.

    Returns the line.
    """

    def check(words: list[str], *named: str, below: Path = tmp_path) -> str:
        before = contents(below)
        capsys.readouterr()
        try:
            code = cli.main(words)
        except SystemExit as left:  # how a launched or interrupted command leaves
            code = left.code
        message = capsys.readouterr().err
        assert code == 2, message
        lines = message.splitlines()
        assert len(lines) == 1, message
        assert lines[0].startswith("sollune: "), message
        assert "Traceback" not in message
        for name in named:
            assert name in lines[0]
        # The remedy follows a dash, or is a name to take instead, or what the value should have been.
        assert any(sign in lines[0] for sign in (" - ", "did you mean", " should ")), message
        assert contents(below) == before
        return lines[0]

    return check


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """A copy of the embedded teacher that a test may break."""
    return Path(shutil.copytree(TEACHER, tmp_path / "teacher"))
