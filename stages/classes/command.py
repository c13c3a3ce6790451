"""`sollune classes show FILE` and `sollune classes suggest RUN`: a class file, looked at before it is painted."""

from collections.abc import Callable, Mapping, Sequence

from configs.load import config_from_arguments
from stages.classes import plan as outlook
from stages.classes import plan as quota_table
from stages.classes import suggestion as suggest
from stages.system.refusal import Refused, did_you_mean

USAGE = "usage: sollune classes show FILE [--config FILE.yaml ...] | suggest RUN --config FILE.yaml [--out FILE]"


def show_classes(argv: Sequence[str]) -> None:
    """Print what a class file would mean; --config takes a finetune_classes section's prompts, run and lengths."""
    argv = ["--classes", *argv] if argv and not argv[0].startswith("-") else argv
    config = config_from_arguments(outlook.Config, "finetune_classes", argv, "sollune classes show")
    if config is not None:
        quota_table.print_plan(config)


def suggest_classes(argv: Sequence[str]) -> None:
    """Measure which classes need it most; --config takes an evaluate section's prompts and scorer."""
    argv = ["--run", *argv] if argv and not argv[0].startswith("-") else argv
    config = config_from_arguments(suggest.Config, "evaluate", argv, "sollune classes suggest")
    if config is not None:
        suggest.run(config)


COMMANDS: Mapping[str, Callable[[Sequence[str]], None]] = {"show": show_classes, "suggest": suggest_classes}


def main(argv: Sequence[str]) -> int:
    """Run one of the two; raises `Refused` for bad input."""
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{USAGE}\nsollune classes show --help and sollune classes suggest --help list the options.")
        return 0
    if argv[0] not in COMMANDS:
        raise Refused(f"classes {argv[0]}: unknown command - {did_you_mean(argv[0], list(COMMANDS))}")
    COMMANDS[argv[0]](argv[1:])
    return 0
