"""Laws of the three streams: whatever they are, and whatever they can print, a command ends by its own code."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
CLI = [sys.executable, "-m", "stages"]
STATS = """
import sys
from stages.system.ending import run_to_exit_code
from stages.system.terminal import prepare_streams
prepare_streams()
def act():
    for _ in range(20_000):
        print('a green circle, gr\\u00fcn \\u2605')
    return 0
sys.exit(run_to_exit_code(act, []))
"""
HELP = """
import sys
from stages.system.ending import run_to_exit_code
from stages.system.terminal import prepare_streams, quiet_libraries
prepare_streams(); quiet_libraries()
from pathlib import Path
from pydantic import Field
from configs.load import load
from configs.values import Strict
class Config(Strict):
    'Gr\\u00fcn \\u2605.'
    run: Path = Field(description='the f\\u00f6lder')
run_to_exit_code(lambda: load(Config, 'distill', [], ['--help']), [])
"""
BOARD = """
from stages.system.terminal import prepare_streams
prepare_streams()
from stages.train.live import make_display
view = make_display('runs/gr\\u00fcn \\u2605', 0, 10)
print(type(view).__name__)
names = 'loss flow guidance block_term grad_norm learning_rate samples_per_second data_wait_seconds bookkeeping_seconds'
names += ' window_seconds effective_size memory_gib'
by_s = {'flow_by_s': [.1, None], 'guidance_by_s': [.1, .2], 'blocks_by_s': [.1, .2]}
line = {'samples': 4, **dict.fromkeys(names.split(), .5), 'blocks': {'mid': .1}, 'lambdas': {'mid': 1}, **by_s}
view.show_line(line, [])
view.show_warning(4, '\\u2605')
view.close()
"""
COLOUR = re.compile(rb"\x1b\[[\d;]*m")


def shell(line: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """A line of bash in the folder of the program; `$cli` is the command, `$stats` a command that prints much."""
    names = {"cli": " ".join(CLI), "PYTHON": sys.executable, "STATS": STATS, **environment}
    return subprocess.run(
        ["bash", "-c", line],
        cwd=ROOT,
        env={**os.environ, **names},
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )


def in_terminal(program: str, **environment: str) -> tuple[int, bytes]:
    """Exit code and output of a Python program whose streams are a terminal."""
    here, there = pty.openpty()
    named = {"TERM": "xterm-256color", **environment}
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    started = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, env=kept | named, stdin=there, stdout=there, stderr=there
    )
    os.close(there)
    printed = b""
    while True:
        try:
            piece = os.read(here, 1 << 16)
        except OSError:  # the terminal's other end is closed
            break
        printed += piece
    os.close(here)
    return started.wait(), printed


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8"])
def test_letters_that_a_terminal_lacks_are_shown_as_their_escapes(encoding: str) -> None:
    done = shell("$cli 'nö★'", PYTHONIOENCODING=encoding)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stderr
    printed = shell('$PYTHON -c "$STATS" | wc -c', PYTHONIOENCODING=encoding)
    assert int(printed.stdout) > 400_000
    assert printed.stderr == ""


def test_a_sentence_that_a_terminal_lacks_ends_no_command() -> None:
    done = shell("$cli sample nö★/x 'ein ★'", PYTHONIOENCODING="ascii")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert done.stderr.startswith("sollune: n\\xf6\\u2605/x: ")


def test_words_that_the_locale_cannot_read_are_refused() -> None:
    done = shell("$cli sample nö★/x x", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", LC_ALL="C")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "is no text in this locale's encoding (ascii) - set PYTHONUTF8=1" in done.stderr


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ('$PYTHON -c "$STATS" >&-', 0),
        ('$PYTHON -c "$STATS" <&- >&- 2>&-', 0),
        ("$cli --version >&-", 0),
        ("$cli nosuch 2>&-", 2),
        ("$cli nosuch 2>/dev/full", 2),
        ('$PYTHON -c "$STATS" | head -1 >/dev/null; exit ${PIPESTATUS[0]}', 141),
    ],
)
def test_streams_that_are_closed_or_full_end_no_command(line: str, code: int) -> None:
    done = shell(line)
    assert (done.returncode, done.stderr) == (code, "")


@pytest.mark.parametrize("command", ['$PYTHON -c "$STATS"', "$cli --help", "$cli --version"])
def test_standard_output_on_a_full_disk_is_one_line(command: str) -> None:
    done = shell(f"{command} > /dev/full")
    assert done.returncode == 2
    assert done.stderr.startswith("sollune: standard output")
    assert "(No space left on device)" in done.stderr or ": No space left on device - " in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_file_opened_later_does_not_take_the_place_of_a_closed_stream(tmp_path: Path) -> None:
    program = (
        "from stages.system.terminal import prepare_streams\nprepare_streams()\n"
        f"import os\nopen({str(tmp_path / 'shard')!r}, 'w').fileno() > 2 or os._exit(9)\nprint('not into the shard')"
    )
    assert shell('$PYTHON -c "$PROGRAM" <&- >&- 2>&-', PROGRAM=program).returncode == 0
    assert (tmp_path / "shard").read_text() == ""


@pytest.mark.parametrize("program", [HELP, BOARD], ids=["help", "board"])
def test_no_color_is_honoured_with_any_value_but_an_empty_one(program: str) -> None:
    code, coloured = in_terminal(program, NO_COLOR="")
    assert code == 0
    assert COLOUR.search(coloured)
    for environment in ({"NO_COLOR": "1"}, {"NO_COLOR": "no"}, {"NO_COLOR": "1", "FORCE_COLOR": "1"}, {"TERM": "dumb"}):
        code, plain = in_terminal(program, **environment)
        assert code == 0
        assert not COLOUR.search(plain)


@pytest.mark.parametrize("program", [HELP, BOARD], ids=["help", "board"])
def test_help_and_board_are_drawn_in_ascii_where_there_is_nothing_else(program: str) -> None:
    code, drawn = in_terminal(program, PYTHONIOENCODING="ascii")
    assert code == 0
    assert drawn.isascii()
    assert b"gr\\xfcn \\u2605" in drawn or b"Gr\\xfcn \\u2605" in drawn
    assert b"Traceback" not in drawn
