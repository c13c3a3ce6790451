"""The command line: it starts fast, runs one command, and turns bad input into one line and exit code 2."""

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
from stages import __main__ as cli
from stages.system.refusal import Refused

ROOT = Path(__file__).parent.parent.parent
HELP = """
import contextlib, io, runpy, sys
sys.argv = ["sollune", "--help"]
output = io.StringIO()
with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
    runpy.run_module("stages", run_name="__main__", alter_sys=True)
assert "cache-teacher" in output.getvalue()
print(sorted(name for name in ("torch", "diffusers", "pydantic", "tyro", "yaml", "numpy") if name in sys.modules))
"""


CONFIGURED = tuple(command for command in cli.COMMANDS if command.kind == "configured")


class Config(Strict):
    """A command that prints its steps."""

    run: Path = Field(description="the run folder")
    steps: int = Field(3, ge=1, description="how many")


def run(config: Config) -> None:
    """Run the configured command."""
    if config.steps == 13:
        raise Refused(f"steps = {config.steps}: unlucky - take another")
    if config.steps == 28:
        raise OSError(errno.ENOSPC, "No space left on device", "shard.tar")
    if config.steps == 99:
        raise KeyboardInterrupt
    print(f"ran {config.steps} in {config.run}")


@pytest.fixture(autouse=True)
def commands(monkeypatch: pytest.MonkeyPatch) -> None:
    """A configured and an argv command in the table instead of the real ones."""
    configured, argv_module = types.ModuleType("a_configured"), types.ModuleType("an_argv")
    configured.__dict__.update(Config=Config, run=run)
    argv_module.__dict__.update(main=lambda argv: print("argv", *argv) or len(argv))
    monkeypatch.setitem(sys.modules, "a_configured", configured)
    monkeypatch.setitem(sys.modules, "an_argv", argv_module)
    distill = cli.Command("distill", "a_configured", "configured", "prints")
    monkeypatch.setattr(cli, "COMMANDS", (distill, cli.Command("shards", "an_argv", "argv", "counts")))


def test_help_imports_neither_torch_nor_any_other_library() -> None:
    done = subprocess.run([sys.executable, "-c", HELP], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_configured_command_gets_section_and_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.yaml").write_text("distill: {run: r, steps: 5}\nsample: {anything: 1}\n")
    assert cli.main(["distill", "--config", str(tmp_path / "a.yaml"), "--steps", "6"]) == 0
    assert capsys.readouterr().out == "ran 6 in r\n"


def test_an_argv_command_gets_its_arguments_and_returns_the_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["shards", "verify", "runs/tiny/cache"]) == 2
    assert capsys.readouterr().out == "argv verify runs/tiny/cache\n"


def test_print_config_prints_and_does_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["distill", "--run", "r", "--print-config"]) == 0
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
    assert cli.main(words.split()) == code
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", f"{line}\n")


def undescribed(options: OptionGroup, path: str) -> Iterator[str]:
    """The fields that `--help` would show without a description."""
    for name, entry in options.entries.items():
        if isinstance(entry, OptionGroup):
            yield from undescribed(entry, f"{path}.{name}")
        elif isinstance(entry, Option) and not entry.description:
            yield f"{path}.{name}"


@pytest.mark.parametrize("command", CONFIGURED, ids=lambda command: command.name)
def test_every_field_of_a_configured_command_has_a_description(command: cli.Command) -> None:
    if find_spec(command.module) is None:
        pytest.skip(f"{command.module} is not built yet")
    config_type = importlib.import_module(command.module).Config
    assert config_type.__doc__
    assert list(undescribed(option_group_of(config_type), command.section)) == []


@pytest.mark.parametrize(
    "module", ["shards.__main__", "stages.prompts.__main__", "stages.upkeep", "stages.hub.publish_run"]
)
def test_a_command_that_needs_no_network_does_not_wait_for_their_library(module: str) -> None:
    program = f"import sys, {module}\nsys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
