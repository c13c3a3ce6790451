"""`sollune classes show FILE` and `sollune classes suggest RUN`: a class file before anything is generated for it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from configs.load import config_from_arguments, name_first_argument
from configs.values import Strict
from stages.classes import class_plan, suggestion
from stages.system.refusal import Refused, did_you_mean

USAGE = "usage: sollune classes show FILE [--config FILE.yaml ...] | suggest RUN --config FILE.yaml [--out FILE]"

COMMANDS: Mapping[str, tuple[type[Strict], str, str, Callable[[Any], None]]] = {
    "show": (class_plan.Config, "finetune_classes", "classes", class_plan.print_plan),
    "suggest": (suggestion.Config, "evaluate", "run", suggestion.run),
}
"""Name -> configuration, the section of --config that it takes, the option of the first argument, function."""


def main(argv: Sequence[str]) -> int:
    """Run one of the two; raises `Refused` for bad input."""
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{USAGE}\nsollune classes show --help and sollune classes suggest --help list the options.")
        return 0
    name, *options = argv
    if name not in COMMANDS:
        raise Refused(f"classes {name}: unknown command - {did_you_mean(name, list(COMMANDS))}")
    config_type, section, first_option, function = COMMANDS[name]
    named = name_first_argument(options, first_option)
    config = config_from_arguments(config_type, section, named, f"sollune classes {name}")
    if config is not None:
        function(config)
    return 0
