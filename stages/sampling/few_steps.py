"""What an export states of a student of few steps: its windows and its guidance scales."""

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import Any, NamedTuple

from stages.nets.run_folder import ORIGIN_FILE, SavedRun
from stages.sampling.fields import DEFAULT_GUIDANCE
from stages.system.refusal import Refused, format_value

MAX_WINDOWS = 100
"""A larger number is no file of ours."""
REMEDY = "export the run again"


class FewSteps(NamedTuple):
    """How a student of few steps is sampled, in the order of `student_field`."""

    windows: int
    """Its steps."""
    guidance_range: tuple[float, float]
    """The least and the greatest guidance scale; twice the same where one is folded into the weights."""

    @property
    def default_guidance(self) -> float:
        """`DEFAULT_GUIDANCE`, or the nearest scale that the student learnt."""
        low, high = self.guidance_range
        return min(max(DEFAULT_GUIDANCE, low), high)


def few_steps_of(facts: Mapping[str, Any], place: str) -> FewSteps | None:
    """From the facts of an exported folder; None for any other model. Raises `Refused` for values that cannot be."""
    windows, learnt = facts.get("windows"), facts.get("guidance_range")
    if windows is None and learnt is None:
        return None
    if type(windows) is not int or not 1 <= windows <= MAX_WINDOWS:
        raise Refused(f"{place}: windows is {format_value(windows)}, not a number of steps - {REMEDY}")
    if not (isinstance(learnt, list | tuple) and len(learnt) == 2 and all(map(_is_scale, learnt))):
        raise Refused(f"{place}: guidance_range is {format_value(learnt)}, not two guidance scales - {REMEDY}")
    low, high = map(float, learnt)
    if low > high:
        raise Refused(f"{place}: guidance_range is {format_value(learnt)}, which falls - {REMEDY}")
    return FewSteps(windows, (low, high))


def folded_few_steps(metadata: Mapping[str, str], place: str) -> FewSteps | None:
    """From the metadata of a single file, whose weights hold one scale; raises `Refused` as `few_steps_of` does."""
    if not {"sollune.windows", "sollune.guidance"} & metadata.keys():
        return None
    values: dict[str, Any] = {key: metadata.get(f"sollune.{key}") for key in ("windows", "guidance")}
    for key, text in values.items():
        with suppress(ValueError, TypeError):
            values[key] = json.loads(text)
    if not _is_scale(values["guidance"]):
        value = format_value(values["guidance"])
        raise Refused(f"{place}: sollune.guidance is {value}, not a guidance scale - {REMEDY}")
    return few_steps_of({"windows": values["windows"], "guidance_range": [values["guidance"]] * 2}, f"{place}: sollune")


def few_steps_of_run(run: SavedRun) -> FewSteps | None:
    """From a run's origin."""
    return few_steps_of(asdict(run.origin), str(run.folder / ORIGIN_FILE))


def refuse_few_steps(run: SavedRun, purpose: str) -> None:
    """Raise `Refused` for a run whose student has one branch, where both are needed."""
    if run.origin.windows is not None:
        raise Refused(
            f"{run.folder}: its student samples in {run.origin.windows} steps and is guided already, and {purpose} "
            "needs both branches - name the distilled run that it came from"
        )


def check_few_steps(place: str, few_steps: FewSteps | None, shift: float, unet: Mapping[str, Any]) -> None:
    """Raise `Refused` where an export's UNet or its shift is not what its windows demand."""
    if few_steps is None:
        return
    low, high = few_steps.guidance_range
    if unet.get("time_cond_proj_dim") is None and low < high:
        raise Refused(f"{place}: states {few_steps.windows} windows, and its UNet takes no guidance scale - {REMEDY}")
    if shift != 1:
        raise Refused(f"{place}: states {few_steps.windows} windows, whose shift is 1, and shift {shift:g} - {REMEDY}")


def _is_scale(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf
