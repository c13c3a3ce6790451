"""The operations a second that a GPU does for this project's networks: measured on one, or a share of what is stated.

The shares are assumptions, until `benchmarks.gpu` has run on such a card: its file takes their place.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.scale.cards import Card, card_of_device
from stages.system.refusal import Refused

HALF_SHARE, SINGLE_SHARE, TRAINING_SHARE = 0.35, 0.6, 0.3
"""Of the stated rates: the teacher in fp16, anything in fp32, and a training step in bf16 or fp16."""
TEACHER_SHARE = 0.95
"""Of the time of caching, what the teacher takes; `benchmarks.cache` holds us to it."""
STAGE_ONE, STAGE_TWO = "stage one", "stage two"
MAX_FILE_BYTES = 1 << 24


@dataclass(frozen=True)
class Rates:
    """Operations a second of one GPU, a multiplication and an addition counting as two."""

    card: Card
    half: float
    """the teacher in fp16"""
    single: float
    """the teacher in fp32, and a training step in it"""
    training: float
    """a training step in bf16 or fp16"""
    teacher_share: float
    source: str

    @classmethod
    def of_card(cls, card: Card) -> "Rates":
        """Shares of what is stated."""
        source = (
            f"assumed: {HALF_SHARE:.0%} of the stated fp16 rate for the teacher, {TRAINING_SHARE:.0%} for training, "
            f"{SINGLE_SHARE:.0%} of fp32 - measure with benchmarks.gpu, and give --rates gpu.json"
        )
        half, single = HALF_SHARE * card.half * 1e12, SINGLE_SHARE * card.single * 1e12
        return cls(card, half, single, TRAINING_SHARE * card.half * 1e12, TEACHER_SHARE, source)

    @classmethod
    def measured(cls, path: Path, card: Card | None) -> "Rates":
        """Those of a file of `benchmarks.gpu`; raises `Refused` for one without them, or of another card.

        What a run that was cut off did not measure is taken from the card's stated rates, and named.
        """
        parts = _parts(path)
        name = str(parts.get("card", {}).get("name", "no card"))
        on = card_of_device(name)
        if on is None:
            raise Refused(f"{path}: was measured on {name}, which is not in the table of cards - leave out --rates")
        if card is not None and card != on:
            raise Refused(f"{path}: was measured on {name}, not on {card.name} - give --gpu {on.name}, or leave it out")
        stated, measured = cls.of_card(on), dict[str, float]()
        for part, figures in parts.items():
            if part.startswith(STAGE_ONE):
                networks = figures.get("networks", {})
                for key, dtype in (("half", "float16"), ("single", "float32")):
                    if (tflops := _positive(networks.get(dtype, {}).get("tflops"))) is not None:
                        measured.setdefault(key, tflops * 1e12)
                if (share := _positive(figures.get("share_in_the_teacher"))) is not None:
                    measured.setdefault("teacher_share", min(share, 1.0))
        each = next((v for f in parts.values() if (v := _positive(f.get("operations_of_a_row"))) is not None), None)
        states = [
            speed
            for part, figures in parts.items()
            if part.startswith(STAGE_TWO) and (speed := _positive(figures.get("states_per_second"))) is not None
        ]
        if each is not None and states:
            measured["training"] = max(states) * OPERATIONS_OF_A_STATE * each
        if not measured:
            raise Refused(f"{path}: holds no rate of stage one or two - run benchmarks.gpu again, or leave out --rates")
        missing = [name for name in ("half", "single", "training") if name not in measured]
        assumed = f"; not in it, so assumed from what is stated: {', '.join(missing)}" if missing else ""
        taken = {name: measured.get(name, getattr(stated, name)) for name in ("half", "single", "training")}
        share = measured.get("teacher_share", TEACHER_SHARE)
        return cls(on, **taken, teacher_share=share, source=f"measured on {name} ({path}){assumed}")


BRANCHES, FORWARD_AND_BACKWARD = 2, 3
"""Of each state: both branches; a pass with its gradient takes as many operations as three without."""
OPERATIONS_OF_A_STATE = BRANCHES * FORWARD_AND_BACKWARD
"""Of a training step, in forward passes of one row."""


def _parts(path: Path) -> dict[str, Mapping[str, Any]]:
    """Name -> figures of each part of the file."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError("is too large")
        entries = json.loads(path.read_text())["parts"]
        return {str(entry["name"]): dict(entry["figures"]) for entry in entries}
    except OSError as error:
        raise Refused(f"{path}: cannot be read ({error.strerror}) - give the file that benchmarks.gpu wrote") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise Refused(f"{path}: is no file of benchmarks.gpu - run it on such a card, or leave out --rates") from error


def _positive(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) and value > 0 else None
