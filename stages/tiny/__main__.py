"""`python -m stages.tiny fit|assemble|check`: make the embedded teacher again, and measure it."""

import argparse
import sys
from pathlib import Path

from stages.system.ending import run_to_exit_code
from stages.tiny import check
from stages.tiny import training as fit


def main() -> int:
    """Run one of the three actions; 1 when an accuracy is below its minimum."""
    parser = argparse.ArgumentParser(prog="python -m stages.tiny", description=__doc__)
    parser.add_argument("action", choices=("fit", "assemble", "check"))
    parser.add_argument("--parts", nargs="+", choices=fit.PARTS, default=list(fit.PARTS), help="parts to train")
    parser.add_argument("--work", type=Path, default=Path("runs/fit"), help="folder of the checkpoints")
    parser.add_argument("--model", type=Path, default=check.MODEL, help="folder of the finished model")
    args = parser.parse_args()
    if args.action == "check":
        return 0 if check.check(args.model) else 1
    if args.action == "fit":
        fit.fit(args.work, tuple(args.parts))
    if set(args.parts) == set(fit.PARTS):
        fit.assemble(args.work, args.model)
    return 0


if __name__ == "__main__":
    sys.exit(run_to_exit_code(main, sys.argv[1:]))
