"""The one door, `sollune COMMAND ...` or `python -m stages`; a command is imported only when it is called."""

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from stages.system.ending import run_to_exit_code
from stages.system.refusal import Refused, did_you_mean
from stages.system.terminal import prepare_streams, quiet_libraries

RUN_MARKS = ("origin.json", "cache.yaml", "config.yaml", "cache")
"""Each lies in a run folder, and in no model's."""


@dataclass(frozen=True)
class Command:
    """A row of the door's table.

    The module of a story has `Config` (a `Strict`) and `run(config)`: the door loads the section and the options.
    The module of a tool has `main(argv) -> int | None` and reads its own words.
    """

    name: str
    module: str
    kind: Literal["story", "tool"]
    meaning: str

    @property
    def section(self) -> str:
        """The command's section in a YAML file."""
        return self.name.replace("-", "_")


COMMANDS = (
    Command("cache-teacher", "stages.cache_teacher", "story", "ask the teacher once and keep its answers in shards"),
    Command("distill", "stages.distill", "story", "teach a velocity model from the cache, and export it"),
    Command("finetune-classes", "stages.finetune_classes", "story", "fine-tune it by class priorities, and export it"),
    Command("evaluate", "stages.evaluate.measure", "tool", "measure a run against its teacher"),
    Command("classes", "stages.classes.command", "tool", "see what a class file means, or which classes need it"),
    Command("david", "stages.evaluate.david", "tool", "see what David sees in a run's student (show RUN)"),
    Command("sample", "stages.sampling.command", "tool", "make pictures of a run, an export or a teacher"),
    Command("import", "stages.import_original", "tool", "make a run of the original experiment's checkpoint"),
    Command("export", "stages.export", "tool", "write a run's model for other programs"),
    Command("publish", "stages.hub.publish", "tool", "send a run's export and newest checkpoint to the hub"),
    Command("prompts", "stages.prompts.__main__", "tool", "look at prompts before they are asked (show|sample|stats)"),
    Command("shards", "stages.upkeep", "tool", "verify, mend, show, count or publish a cache"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0, 2 for bad input, 130 when interrupted, 1 for what nobody foresaw.

    One line on standard error says why (see `stages.system.ending`).
    """
    words = list(sys.argv[1:] if argv is None else argv)
    runs: list[Path] = []
    prepare_streams()
    return run_to_exit_code(lambda: dispatch(words, runs), words, lambda: run_folder(words, runs))


def dispatch(words: list[str], runs: list[Path]) -> int:
    """Find the command in the table and call it; the run folder of a story is added to `runs`."""
    refuse_unreadable(words)
    if not words or words[0] in ("-h", "--help"):
        print(_help())
        return 0
    if words[0] == "--version":
        print(f"sollune {_version()}")
        return 0
    names = [command.name for command in COMMANDS]
    if words[0] not in names:
        raise Refused(f"{words[0]}: unknown command - {did_you_mean(words[0], names)}")
    return run_command(COMMANDS[names.index(words[0])], words[1:], runs)


def run_command(command: Command, words: list[str], runs: list[Path]) -> int:
    """Import the command's module and hand it its configuration, or its words."""
    quiet_libraries()
    module: Any = importlib.import_module(command.module)
    silence_diffusers()
    if command.kind == "tool":
        return module.main(words) or 0
    from configs.load import config_from_arguments

    config = config_from_arguments(module.Config, command.section, words)
    if config is not None:
        runs.append(config.run)
        module.run(config)
    return 0


def refuse_unreadable(words: Sequence[str]) -> None:
    """Raise `Refused` for a word that the locale cannot read; where it reads UTF-8, who takes the word judges it."""
    encoding = sys.getfilesystemencoding()
    for word in words if encoding != "utf-8" else ():
        if any("\ud800" <= letter <= "\udfff" for letter in word):
            raise Refused(
                f"{word}: is no text in this locale's encoding ({encoding}) - set PYTHONUTF8=1, or LC_ALL=C.UTF-8"
            )


def run_folder(words: Sequence[str], runs: Sequence[Path]) -> Path | None:
    """The run folder of a command, if it exists: a story's own, the value of --run, or else the first that is one."""
    named = [*map(str, runs)] or [word.removeprefix("--run=") for word in words if word.startswith("--run=")]
    named = named or [after for word, after in pairwise(words) if word == "--run"]
    if named:
        return Path(named[-1]) if _is_there(Path(named[-1], ".")) else None
    folders = (Path(word) for word in words if not word.startswith("-"))
    return next((folder for folder in folders if any(_is_there(folder / mark) for mark in RUN_MARKS)), None)


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a sentence, say, which is too long for a name
        return False


def silence_diffusers() -> None:
    """Switch off the bars of diffusers, which reads no environment variable, if the command has imported it."""
    logging: Any = sys.modules.get("diffusers.utils.logging")
    if logging is not None:
        logging.disable_progress_bar()


def _help() -> str:
    width = max(len(command.name) for command in COMMANDS)
    rows = "\n".join(f"  {command.name:<{width}}  {command.meaning}" for command in COMMANDS)
    return (
        f"usage: sollune COMMAND [--config FILE.yaml ...] [options]\n\n{rows}\n\n"
        "sollune COMMAND --help lists its options with their defaults, units and meanings.\n"
        "YAML files are laid over each other, later over earlier; options lie on top."
    )


def _version() -> str:
    try:
        return version("sollune")
    except PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
