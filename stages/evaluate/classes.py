"""`sollune classes show FILE` and `sollune classes suggest RUN`: a class file, looked at before it is painted."""

from collections.abc import Callable, Mapping, Sequence

from configs.load import asked_for
from configs.refusal import Refused, did_you_mean
from stages.evaluate import outlook, quota_table, suggest

USAGE = "usage: sollune classes show FILE [--config FILE.yaml ...] | suggest RUN --config FILE.yaml [--out FILE]"


def show(words: Sequence[str]) -> None:
    """Print what a class file would mean; --config takes a finetune_classes section's prompts, run and lengths."""
    words = ["--classes", *words] if words and not words[0].startswith("-") else words
    config = asked_for(outlook.Config, "finetune_classes", words, "sollune classes show")
    if config is not None:
        quota_table.show(config)


def propose(words: Sequence[str]) -> None:
    """Measure which classes need it most; --config takes an evaluate section's prompts and scorer."""
    words = ["--run", *words] if words and not words[0].startswith("-") else words
    config = asked_for(suggest.Config, "evaluate", words, "sollune classes suggest")
    if config is not None:
        suggest.run(config)


COMMANDS: Mapping[str, Callable[[Sequence[str]], None]] = {"show": show, "suggest": propose}


def main(argv: Sequence[str]) -> int:
    """Run one of the two; raises `Refused` for bad input."""
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{USAGE}\nsollune classes show --help and sollune classes suggest --help list the options.")
        return 0
    if argv[0] not in COMMANDS:
        raise Refused(f"classes {argv[0]}: unknown command - {did_you_mean(argv[0], list(COMMANDS))}")
    COMMANDS[argv[0]](argv[1:])
    return 0
