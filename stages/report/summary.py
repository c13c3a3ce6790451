"""What the first screen says in plain words: what was made, whether it worked by a stated rule, and a few figures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stages.export.history import POLISHED_KEY, STUDENT_KEY
from stages.report.charts import short
from stages.report.records import RunRecord

WORKED_UP_TO, PARTLY_UP_TO = 0.2, 0.5
RULE = (
    "A run worked when every limit that was set for its measurement is kept. Where none was set, the error of its "
    f"pictures counts, from 0 (the teacher's own pictures) to 1 (unrelated pictures): up to {WORKED_UP_TO:g} it "
    f"worked, up to {PARTLY_UP_TO:g} it worked in part, above that it did not. Without measured pictures the page "
    "does not say."
)

Level = Literal["worked", "partly", "failed", "running", "unknown"]
HEADLINES: Mapping[Level, str] = {
    "worked": "It worked.",
    "partly": "It worked in part.",
    "failed": "It did not work.",
    "running": "It is still training.",
    "unknown": "Its pictures are not measured yet.",
}


@dataclass(frozen=True)
class Figure:
    """A number of the first screen with what it means."""

    value: str
    label: str
    meaning: str


@dataclass(frozen=True)
class Outcome:
    """Whether a run worked, and by what."""

    level: Level
    reasons: Sequence[str]

    @property
    def headline(self) -> str:
        """In one short sentence."""
        return HEADLINES[self.level]


def describe(run: RunRecord) -> str:
    """What a run makes, for somebody outside the field."""
    teacher = f"an existing model (“{_teacher_name(run)}”, the teacher)"
    if run.origin.windows:
        steps = f"{run.origin.windows} step{'s' * (run.origin.windows > 1)}"
        return (
            f"This is a fast text-to-image model: it draws a picture in {steps}, where {teacher} takes dozens. "
            "It was trained to land where the teacher's path from noise to picture leads."
        )
    if run.exams or run.classes:
        return (
            f"This is a text-to-image model that was first taught to imitate {teacher}, and then trained on with more "
            "weight on chosen kinds of pictures."
        )
    if run.origin.base:
        return (
            f"This is a text-to-image model made from a fine-tuned one ({teacher}). It draws the same pictures along a "
            "straight path from noise to picture (flow matching)."
        )
    return (
        f"This is a text-to-image model that was taught to imitate {teacher}, but to draw in another way: along a "
        "straight path from pure noise to the picture (flow matching)."
    )


def judge(run: RunRecord) -> Outcome:
    """Whether it worked, by `RULE`; of a run that is not finished only how far it is."""
    if not run.complete:
        return Outcome("running", [_progress(run)])
    if gates := run.gates:
        missed = [f"{gate.name}: {short(gate.found)}, limit {gate.asked}" for gate in gates if not gate.passed]
        kept = f"{len(gates) - len(missed)} of {len(gates)} limits of its measurement are kept"
        return Outcome("failed" if missed else "worked", [f"{kept}.", *(f"Missed: {one}." for one in missed)])
    if (error := picture_error(run)) is None:
        place = "RUN" if run.folder.is_absolute() else run.folder  # a page tells nothing of its machine
        words = [f"Measure them: sollune evaluate {place}"]
        other = run.history.evaluated_at
        if other is not None and other != run.samples:
            words.insert(0, f"What was measured belongs to its checkpoint at {other:,} samples, not this one.")
        return Outcome("unknown", words)
    value, where = error
    level: Level = "worked" if value <= WORKED_UP_TO else "partly" if value <= PARTLY_UP_TO else "failed"
    scale = f"0: the teacher's own, 1: unrelated; up to {WORKED_UP_TO:g} counts as worked"
    return Outcome(level, [f"The error of its pictures is {value:.3g} {where} ({scale})."])


def picture_error(run: RunRecord) -> tuple[float, str] | None:
    """The error of finished pictures, 0 to 1, and at how many steps; None where none were measured."""
    for scores in (
        (run.history.evaluation.get("paired") or {}).get(STUDENT_KEY),
        (run.history.conversion.get("errors") or {}).get(POLISHED_KEY),
    ):
        known = [one for one in scores or () if one["score"] is not None]
        if known:
            last = max(known, key=lambda one: int(one["steps"]))
            return float(last["score"]), f"at {last['steps']} steps"
    if run.origin.windows and (end := run.history.landings.get("end")) is not None:
        return float(end), f"in {run.origin.windows} steps"
    return None


def figures(run: RunRecord) -> list[Figure]:
    """The headline figures that there are."""
    made = [Figure(f"{run.seen_samples:,}", "training samples", _of_all(run))]
    seconds = sum((line.window_seconds or 0) + (line.paused_seconds or 0) for line in run.steps)
    if seconds:
        made.append(Figure(_clock(round(seconds)), "time of training", "hours : minutes : seconds"))
    held_out = [line.held_out for line in run.validations if line.held_out is not None]
    if held_out:
        meaning = "each step's difference from the teacher's, for texts that it was not trained on; 0 % is best"
        made.append(Figure(percent(held_out[-1]), "error of its single steps", meaning))
    if error := picture_error(run):
        made.append(
            Figure(f"{error[0]:.3f}", f"error of its pictures {error[1]}", "0: the teacher's own, 1: unrelated")
        )
    shown = (run.history.evaluation.get("fidelity") or {}).get(STUDENT_KEY)
    if shown and shown["all_at_once"] is not None:
        teacher = (run.history.evaluation["fidelity"].get("teacher") or {}).get("all_at_once")
        of_how_many = f" of {shown['pictures']:,}" if shown.get("pictures") else ""
        against = "" if teacher is None else f"; of the teacher's: {percent(teacher)}"
        meaning = f"by a program that recognises what is on a picture{against}; 100 % is best"
        made.append(
            Figure(percent(shown["all_at_once"]), f"of its pictures{of_how_many} show what their text says", meaning)
        )
    return made


def percent(share: float) -> str:
    """A share as a reader's number."""
    return f"{100 * share:.3g} %"


def _clock(seconds: int) -> str:
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def _of_all(run: RunRecord) -> str:
    return f"of {run.max_samples:,}" if run.max_samples else "so far"


def _progress(run: RunRecord) -> str:
    if not run.steps:
        return "Nothing is in its journal yet."
    share = f", {percent(run.seen_samples / run.max_samples)} of the way" if run.max_samples else ""
    return f"It has seen {run.seen_samples:,} training samples{share}."


def _teacher_name(run: RunRecord) -> str:
    """Its hub id, or the last parts of its place."""
    place = Path(str(run.export.get("base_model") or run.origin.teacher))
    return "/".join(place.parts[-2:]) if len(place.parts) > 1 else str(place)
