"""Laws of the one door: it opens fast, calls one command, and turns bad input into one line and exit code 2."""

import errno
import importlib
import subprocess
import sys
import types
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from pydantic import Field

from configs.schema import Option, OptionGroup, option_group_of
from configs.values import Strict
from stages import __main__ as door
from stages.system.refusal import Refused

ROOT = Path(__file__).parent.parent.parent
HELP = """
import contextlib, io, runpy, sys
sys.argv = ["sollune", "--help"]
said = io.StringIO()
with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
    runpy.run_module("stages", run_name="__main__", alter_sys=True)
assert "cache-teacher" in said.getvalue()
print(sorted(name for name in ("torch", "diffusers", "pydantic", "tyro", "yaml", "numpy") if name in sys.modules))
"""


STORIES = tuple(command for command in door.COMMANDS if command.kind == "story")


class Config(Strict):
    """A story that says its steps."""

    run: Path = Field(description="the run folder")
    steps: int = Field(3, ge=1, description="how many")


def tell(config: Config) -> None:
    """Do what the story does."""
    if config.steps == 13:
        raise Refused(f"steps = {config.steps}: unlucky - take another")
    if config.steps == 28:
        raise OSError(errno.ENOSPC, "No space left on device", "shard.tar")
    if config.steps == 99:
        raise KeyboardInterrupt
    print(f"told {config.steps} in {config.run}")


@pytest.fixture(autouse=True)
def commands(monkeypatch: pytest.MonkeyPatch) -> None:
    """A story and a tool in the table instead of the real ones."""
    story, tool = types.ModuleType("a_story"), types.ModuleType("a_tool")
    story.__dict__.update(Config=Config, run=tell)
    tool.__dict__.update(main=lambda words: print("tool", *words) or len(words))
    monkeypatch.setitem(sys.modules, "a_story", story)
    monkeypatch.setitem(sys.modules, "a_tool", tool)
    rows = (door.Command("distill", "a_story", "story", "tells"), door.Command("shards", "a_tool", "tool", "counts"))
    monkeypatch.setattr(door, "COMMANDS", rows)


def test_help_imports_neither_torch_nor_any_other_library() -> None:
    done = subprocess.run([sys.executable, "-c", HELP], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_story_gets_its_section_and_its_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.yaml").write_text("distill: {run: r, steps: 5}\nsample: {anything: 1}\n")
    assert door.main(["distill", "--config", str(tmp_path / "a.yaml"), "--steps", "6"]) == 0
    assert capsys.readouterr().out == "told 6 in r\n"


def test_a_tool_gets_its_words_and_gives_the_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert door.main(["shards", "verify", "runs/tiny/cache"]) == 2
    assert capsys.readouterr().out == "tool verify runs/tiny/cache\n"


def test_print_config_prints_and_does_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert door.main(["distill", "--run", "r", "--print-config"]) == 0
    assert capsys.readouterr().out == "distill:\n  run: r\n  steps: 3\n"


@pytest.mark.parametrize(
    ("words", "line", "code"),
    [
        ("distil", "sollune: distil: unknown command - did you mean distill?", 2),
        ("distill --run r --stpes 3", "sollune: --stpes: unknown option - did you mean --steps?", 2),
        (
            "distill --run r --steps 0",
            "sollune: command line: distill.steps = 0: should be greater than or equal to 1",
            2,
        ),
        ("distill", "sollune: distill.run: required - write it in a YAML file or give --run", 2),
        ("distill --config", "sollune: --config: needs at least one YAML file, such as configs/tiny.yaml", 2),
        ("distill --run r --steps 13", "sollune: steps = 13: unlucky - take another", 2),
        (
            "distill --run r --steps 28",
            "sollune: shard.tar: cannot be opened or written (No space left on device) - "
            "free some space or choose another folder",
            2,
        ),
        ("distill --run r --steps 99", "sollune: interrupted - the same command goes on from here", 130),
    ],
)
def test_bad_input_is_one_line_and_an_exit_code(
    words: str, line: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert door.main(words.split()) == code
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", f"{line}\n")


def unexplained(room: OptionGroup, path: str) -> Iterator[str]:
    """The fields that `--help` would show without a meaning."""
    for name, entry in room.entries.items():
        if isinstance(entry, OptionGroup):
            yield from unexplained(entry, f"{path}.{name}")
        elif isinstance(entry, Option) and not entry.description:
            yield f"{path}.{name}"


@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.name)
def test_every_field_of_a_story_has_a_meaning(story: door.Command) -> None:
    if find_spec(story.module) is None:
        pytest.skip(f"{story.module} is not built yet")
    config_type = importlib.import_module(story.module).Config
    assert config_type.__doc__
    assert list(unexplained(option_group_of(config_type), story.section)) == []
