"""`python -m stages.tiny ACTION`: make the embedded teacher or one of handwritten digits, and measure it.

fit, assemble, check: train the embedded teacher's parts, join them to a folder, measure it.
digits, check-digits: make a teacher of handwritten digits in minutes, measure it; digits-judge makes its judge again.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from configs.arguments import path_argument
from stages.system.ending import run_to_exit_code
from stages.system.refusal import Parser, Refused, format_value
from stages.tiny import check, embedded, folder
from stages.tiny.digits import check as check_digits
from stages.tiny.digits import score as digits_score
from stages.tiny.digits.recipe import Recipe, make_judge, make_teacher


def seed(text: str) -> int:
    """A seed; raises `Refused` for anything but a whole number from 0 to 2^63 - 1."""
    if not (text.isascii() and text.isdigit() and int(text) < 2**63):
        raise Refused(
            f"--seed: {format_value(text)}: is no whole number from 0 to 2^63 - 1 - leave it out for the usual"
        )
    return int(text)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The action and its options."""
    parser = Parser(prog="python -m stages.tiny", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    embedded_teacher = {"fit": "train parts of it", "assemble": "join them to a folder", "check": "measure it"}
    for name, text in embedded_teacher.items():
        action = actions.add_parser(name, help=f"the embedded teacher: {text}")
        _add_path(action, "--work", "runs/fit", "folder of the checkpoints")
        _add_path(action, "--model", folder.MODEL, "folder of the finished model")
        action.add_argument(
            "--parts", nargs="+", choices=embedded.PARTS, default=list(embedded.PARTS), help="parts to train"
        )
    digits = actions.add_parser("digits", help="handwritten digits: make a teacher")
    judge = actions.add_parser("digits-judge", help="handwritten digits: make the judge again")
    measured = actions.add_parser("check-digits", help="handwritten digits: measure a teacher")
    for action in (digits, judge):
        _add_path(action, "--work", "runs/digits/fit", "folder of the checkpoints, from which it continues")
        action.add_argument("--seed", type=seed, default=Recipe().seed, help="of pictures and training")
    for action in (digits, measured):
        _add_path(action, "--model", "runs/digits/teacher", "the teacher's folder")
    _add_path(judge, "--judge", digits_score.FILE, "file of the judge's weights")
    return parser.parse_args(argv)


def _add_path(action: argparse.ArgumentParser, option: str, default: Path | str, text: str) -> None:
    action.add_argument(option, type=path_argument, default=Path(default), help=f"{text} ({default})")


def main(argv: Sequence[str]) -> int:
    """Run one action; 1 when an accuracy of the embedded teacher is below its minimum."""
    args, since = parse(argv), time.perf_counter()
    if args.action == "check":
        return 0 if check.check(args.model) else 1
    if args.action == "fit":
        embedded.fit(args.work, tuple(args.parts))
    if args.action in ("fit", "assemble") and set(args.parts) == set(embedded.PARTS):
        embedded.assemble(args.work, args.model)
    if args.action == "digits":
        make_teacher(Recipe(seed=args.seed), args.work, args.model)
        minutes = (time.perf_counter() - since) / 60
        processor = time.process_time() / 60
        print(f"{args.model}: a teacher of handwritten digits, in {minutes:.1f} minutes ({processor:.1f} of processor)")
    if args.action == "digits-judge":
        make_judge(Recipe(seed=args.seed), args.work, args.judge)
    if args.action == "check-digits":
        check_digits.check(args.model)
    return 0


if __name__ == "__main__":
    sys.exit(run_to_exit_code(partial(main, sys.argv[1:]), sys.argv[1:]))
