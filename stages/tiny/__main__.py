"""`python -m stages.tiny fit|assemble|check`: make the embedded teacher again, and measure it."""

import argparse
import sys
from pathlib import Path

from stages.system.refusal import Refused
from stages.tiny import assemble, check, fit


def main() -> int:
    """Run one of the three acts; 1 when a gate is missed."""
    parser = argparse.ArgumentParser(prog="python -m stages.tiny", description=__doc__)
    parser.add_argument("act", choices=("fit", "assemble", "check"))
    parser.add_argument("--parts", nargs="+", choices=fit.PARTS, default=list(fit.PARTS), help="parts to train")
    parser.add_argument("--work", type=Path, default=Path("runs/fit"), help="folder of the checkpoints")
    parser.add_argument("--model", type=Path, default=check.MODEL, help="folder of the finished model")
    asked = parser.parse_args()
    if asked.act == "fit":
        fit.fit(asked.work, tuple(asked.parts))
    if asked.act in ("fit", "assemble") and set(asked.parts) == set(fit.PARTS):
        assemble.assemble(asked.work, asked.model)
    return 0 if asked.act != "check" or check.check(asked.model) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Refused as refused:
        sys.exit(f"stages.tiny: {refused}")
