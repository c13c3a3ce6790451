"""The one door, `sollune COMMAND ...` or `python -m stages`; a command is imported only when it is called."""

import errno
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from configs.refusal import Refused, did_you_mean

REFUSED, INTERRUPTED, READER_GONE = 2, 130, 141


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
    Command("classes", "stages.evaluate.classes", "tool", "see what a class file means, or which classes need it"),
    Command("david", "stages.evaluate.david", "tool", "see what David sees in a run's student (show RUN)"),
    Command("sample", "stages.evaluate.pictures", "tool", "make pictures of a run, an export or a teacher"),
    Command("import", "stages.import_original", "tool", "make a run of the original experiment's checkpoint"),
    Command("export", "stages.export", "tool", "write a run's model for other programs"),
    Command("publish", "stages.export.publish", "tool", "send a run's export and newest checkpoint to the hub"),
    Command("prompts", "stages.prompts.__main__", "tool", "look at prompts before they are asked (show|sample|stats)"),
    Command("shards", "stages.upkeep", "tool", "verify, mend, show, count or publish a cache"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0, 2 for bad input (told on stderr), 130 when interrupted."""
    try:
        return dispatch(list(sys.argv[1:] if argv is None else argv))
    except Refused as refusal:
        return _complain(str(refusal), REFUSED)
    except KeyboardInterrupt:
        return _complain("interrupted - the same command goes on from here", INTERRUPTED)
    except BrokenPipeError:
        # The reader went away (`| head`): nobody listens, and Python's own last flush must not complain either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READER_GONE
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return _complain(
            f"{error.filename or 'disk'}: no space left - free some, then run the same command again", REFUSED
        )


def dispatch(words: list[str]) -> int:
    """Find the command in the table and call it."""
    if not words or words[0] in ("-h", "--help"):
        print(_help())
        return 0
    if words[0] == "--version":
        print(f"sollune {_version()}")
        return 0
    names = [command.name for command in COMMANDS]
    if words[0] not in names:
        raise Refused(f"{words[0]}: unknown command - {did_you_mean(words[0], names)}")
    return call(COMMANDS[names.index(words[0])], words[1:])


def call(command: Command, words: list[str]) -> int:
    """Import the command's module and hand it its configuration, or its words."""
    quiet_before_import()
    module: Any = importlib.import_module(command.module)
    quiet_after_import()
    if command.kind == "tool":
        return module.main(words) or 0
    from configs.load import asked_for  # here, so that `sollune --help` does without pydantic

    config = asked_for(module.Config, command.section, words)
    if config is not None:
        module.run(config)
    return 0


def quiet_before_import() -> None:
    """Let libraries speak of errors only, unless the user's environment says otherwise.

    The hub's bars go too: transformers draws one per loaded folder and knows no other switch.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def quiet_after_import() -> None:
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


def _complain(message: str, code: int) -> int:
    for line in message.splitlines():
        print(f"sollune: {line}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
