"""The command line, `sollune COMMAND ...` or `python -m stages`; a command is imported only when it is called."""

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from stages.system.ending import MEMORY_HINT, installed_version, run_to_exit_code
from stages.system.refusal import Refused, did_you_mean
from stages.system.storage.attached import attached_locations
from stages.system.terminal import prepare_streams, quiet_libraries

RUN_MARKS = ("origin.json", "cache.yaml", "config.yaml", "cache")
"""Each is in a run folder, and in no model folder."""
RUN_OPTIONS = {"convert": "--out"}
"""Command -> the option that names its run folder, if that is not --run."""
MEMORY_HINTS = {
    "cache-teacher": "lower render.batch_size",
    "distill": "raise train.accumulate, which keeps the batch, or lower train.batch_size (train.batch_pixels)",
    "finetune-classes": "raise train.accumulate, which leaves the batch as it is, or lower render.batch_size",
    "convert": "raise train.accumulate, which keeps the batch, or lower render.batch_size and the samplers' batch_size",
    "evaluate": "lower fidelity.prompts and paired.prompts",
}
"""Command -> how to make it use less memory."""


@dataclass(frozen=True)
class Command:
    """A command and the module that implements it.

    The module of a configured command has `Config` (a `Strict`) and `run(config)`; its configuration is loaded here.
    The module of an argv command has `main(argv) -> int | None`, which parses its arguments.
    """

    name: str
    module: str
    kind: Literal["configured", "argv"]
    summary: str

    @property
    def section(self) -> str:
        """The command's section in a YAML file."""
        return self.name.replace("-", "_")


COMMANDS = (
    Command("doctor", "stages.doctor", "argv", "look a teacher over before anything is made with it"),
    Command(
        "cache-teacher", "stages.cache_teacher", "configured", "run the teacher once and store its outputs in shards"
    ),
    Command("distill", "stages.distill", "configured", "train a velocity model on the cache, and export it"),
    Command(
        "finetune-classes", "stages.finetune_classes", "configured", "fine-tune it by class priorities, and export it"
    ),
    Command("convert", "stages.convert.command", "argv", "convert a fine-tune, from the student of its base model"),
    Command("evaluate", "stages.evaluate.measure", "argv", "measure a run against its teacher"),
    Command("report", "stages.report.command", "argv", "write one page about runs: pictures, curves, verdicts"),
    Command("classes", "stages.classes.classes_command", "argv", "show what a class file means, or suggest one"),
    Command("david", "stages.evaluate.david", "argv", "show what David measures in a run's student (show RUN)"),
    Command("sample", "stages.sampling.sample_command", "argv", "generate pictures with a run, an export or a teacher"),
    Command("import", "stages.import_original", "argv", "make a run from a checkpoint of the original experiment"),
    Command("export", "stages.export", "argv", "write a run's model for other programs"),
    Command(
        "ablate", "stages.ablation.command", "argv", "compare settings of distill or finetune-classes, with verdicts"
    ),
    Command("publish", "stages.hub.publish_run", "argv", "upload a run's export and newest checkpoint to the hub"),
    Command("prompts", "stages.prompts.__main__", "argv", "show prompts before they are used (show|sample|stats)"),
    Command("shards", "stages.upkeep", "argv", "verify, repair, show, count or publish a cache"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code (see `stages.system.ending.run_to_exit_code`)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    runs: list[Path] = []
    prepare_streams()

    def command() -> int:
        with attached_locations():
            return dispatch(arguments, runs)

    return run_to_exit_code(command, arguments, lambda: run_folder(arguments, runs), memory_hint(arguments))


def dispatch(argv: Sequence[str], runs: list[Path]) -> int:
    """Find the command and run it; the run folder of a configured command is added to `runs`."""
    refuse_undecodable(argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_help())
        return 0
    if argv[0] == "--version":
        print(f"sollune {installed_version('sollune')}")
        return 0
    commands = {command.name: command for command in COMMANDS}
    if argv[0] not in commands:
        raise Refused(f"{argv[0]}: unknown command - {did_you_mean(argv[0], list(commands))}")
    return run_command(commands[argv[0]], argv[1:], runs)


def run_command(command: Command, argv: Sequence[str], runs: list[Path]) -> int:
    """Import the command's module and call it with its configuration, or its arguments."""
    quiet_libraries()
    module: Any = importlib.import_module(command.module)
    disable_diffusers_bars()
    if command.kind == "argv":
        return module.main(argv) or 0
    from configs.load import config_from_arguments

    config = config_from_arguments(module.Config, command.section, argv)
    if config is not None:
        runs.append(config.run)
        module.run(config)
    return 0


def refuse_undecodable(argv: Sequence[str]) -> None:
    """Raise `Refused` for an argument that the locale cannot decode; in a UTF-8 locale the commands check it."""
    encoding = sys.getfilesystemencoding()
    for word in argv if encoding != "utf-8" else ():
        if any("\ud800" <= letter <= "\udfff" for letter in word):
            raise Refused(
                f"{word}: is no text in this locale's encoding ({encoding}) - set PYTHONUTF8=1, or LC_ALL=C.UTF-8"
            )


def memory_hint(argv: Sequence[str]) -> str:
    """How to make the command use less memory."""
    return MEMORY_HINTS.get(next(iter(argv), ""), MEMORY_HINT)


def run_folder(argv: Sequence[str], runs: Sequence[Path]) -> Path | None:
    """The run folder that a command writes to, if it exists.

    That of `runs`, or the value of --run (--out of a command that reads one run and writes another), or else the first
    argument that is a run.
    """
    option = RUN_OPTIONS.get(next(iter(argv), ""), "--run")
    named = [*map(str, runs)] or [word.removeprefix(f"{option}=") for word in argv if word.startswith(f"{option}=")]
    named = named or [value for word, value in pairwise(argv) if word == option]
    if named:
        return Path(named[-1]) if _exists(Path(named[-1], ".")) else None
    folders = (Path(word) for word in argv if not word.startswith("-"))
    return next((folder for folder in folders if any(_exists(folder / mark) for mark in RUN_MARKS)), None)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a sentence, say, which is too long for a file name
        return False


def disable_diffusers_bars() -> None:
    """Disable the progress bars of diffusers, which has no environment variable for them, if it is imported."""
    logging: Any = sys.modules.get("diffusers.utils.logging")
    if logging is not None:
        logging.disable_progress_bar()


def _help() -> str:
    width = max(len(command.name) for command in COMMANDS)
    rows = "\n".join(f"  {command.name:<{width}}  {command.summary}" for command in COMMANDS)
    return (
        f"usage: sollune COMMAND [--config FILE.yaml ...] [options]\n\n{rows}\n\n"
        "sollune COMMAND --help lists its options with their defaults, units and meanings.\n"
        "Later YAML files override earlier ones; options override both."
    )


if __name__ == "__main__":
    sys.exit(main())
