"""A teacher loaded with the prediction type that was measured, or else with the one that its files or its user name."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from stages.flow.schedule import NoiseSchedule
from stages.nets.components import Components, load_components, open_teacher, read_schedule
from stages.nets.prediction import MeasuredPrediction, measure_prediction
from stages.system.refusal import Refused
from stages.teacher_files.open import TeacherFolder, open_teacher_files
from stages.teacher_files.source import TeacherSource


@dataclass(frozen=True)
class UsedPrediction:
    """What is taken as a teacher's prediction, and the lines that say why."""

    prediction_type: str
    zero_terminal_snr: bool
    lines: tuple[str, ...]

    def applied_to(self, components: Components) -> Components:
        """The same parts with a config that says it: where theirs does not, a folder is composed that does."""
        schedule, files = components.schedule, components.files
        same = (schedule.prediction_type, schedule.has_zero_terminal_snr) == (
            self.prediction_type,
            self.zero_terminal_snr,
        )
        if same or files is None:
            return components
        files = open_teacher_files(with_prediction(files.source, self))
        return replace(components, folder=files.folder, files=files, schedule=read_schedule(files.folder))


@dataclass(frozen=True)
class MeasuredTeacher:
    """The parts of a teacher, whose config says what is used, and what was measured."""

    components: Components
    source: TeacherSource
    """Opens the same teacher again without a measurement."""
    measured: MeasuredPrediction
    used: UsedPrediction


def load_measured_teacher(
    source: TeacherSource | TeacherFolder, device: torch.device, dtype: torch.dtype = torch.float32
) -> MeasuredTeacher:
    """Open and load a teacher, measure what it predicts, and open it so that its config says what is used.

    Raises `Refused` where its files state another prediction type than is measured.
    """
    files = source if isinstance(source, TeacherFolder) else open_teacher(source)
    components = load_components(files, device, dtype)
    measured = measure_prediction(components)
    used = used_prediction(files.source, files.stated, measured, components.schedule)
    components = used.applied_to(components)
    return MeasuredTeacher(components, components.files.source if components.files else files.source, measured, used)


def with_prediction(source: TeacherSource, used: UsedPrediction) -> TeacherSource:
    """The same source with its prediction named."""
    zero = "true" if used.zero_terminal_snr else "false"
    return source.model_copy(update={"prediction": used.prediction_type, "zero_terminal_snr": zero})


def used_prediction(
    source: TeacherSource, stated: Mapping[str, Any], measured: MeasuredPrediction, schedule: NoiseSchedule
) -> UsedPrediction:
    """The user's choice, or else what files state and the measurement does not contradict, or else the measured one.

    Where none of them says anything it is that of `schedule`, by whose config the teacher was loaded.

    Raises `Refused` for a contradiction, with the figures and the options that settle it.
    """
    if measured.prediction_type == "sample" and source.prediction == NO_CHOICE:
        raise Refused(
            f"teacher: {source.location}: its network answers with the data itself (prediction type sample: "
            f"{measured.figures}), which is not supported - take a model that predicts epsilon or v"
        )
    kind, by_kind = _choice(source.prediction, stated.get("prediction_type"), measured.prediction_type)
    _refuse_contradiction(source, by_kind, measured, f"prediction_type {stated.get('prediction_type')}")
    lines = [*_warning(source, by_kind, measured, f"--teacher.prediction {kind}")]
    if kind is None:
        kind, by_kind = schedule.prediction_type, "of its config"
    chosen = {"true": True, "false": False}.get(source.zero_terminal_snr, NO_CHOICE)
    seen = measured.zero_terminal_snr if kind == measured.prediction_type == "v_prediction" else None
    zero, by_zero = _choice(chosen, stated.get("zero_terminal_snr"), seen)
    if kind == "epsilon":
        zero = chosen is True  # then refused when the schedule is read: of no signal epsilon says nothing
    elif zero is None or (schedule.has_zero_terminal_snr and seen is None and chosen == NO_CHOICE):
        zero = schedule.has_zero_terminal_snr  # of its betas, which need no rescaling
    else:
        ending = f"rescale_betas_zero_snr {str(stated.get('zero_terminal_snr')).lower()}"
        _refuse_contradiction(source, by_zero, measured, ending)
        lines += _warning(source, by_zero, measured, f"--teacher.zero-terminal-snr {str(zero).lower()}")
    agreed = by_kind == STATED and measured.prediction_type == kind
    ending = " with zero terminal SNR" if zero else ""
    reason = f"{by_kind}, and measured" if agreed else f"{by_kind}; measured: {measured.text}"
    lines.append(f"teacher: {source.location} predicts {kind}{ending} ({reason})")
    return UsedPrediction(kind, bool(zero), tuple(lines))


NO_CHOICE = "auto"
STATED, CONTRADICTED, CHOSEN_AGAINST = "stated by its files", "contradicted", "chosen against the measurement"


def _choice(chosen: Any, stated: Any, seen: Any) -> tuple[Any, str]:
    """A value and by whom it is: of the user, the files, the measurement; `NO_CHOICE` and None say nothing."""
    if chosen != NO_CHOICE:
        return chosen, "chosen" if seen in (None, chosen) else CHOSEN_AGAINST
    if stated is not None:
        return stated, STATED if seen in (None, stated) else CONTRADICTED
    return (seen, "measured, as its files state nothing") if seen is not None else (None, "")


def _refuse_contradiction(source: TeacherSource, by: str, measured: MeasuredPrediction, stated: str) -> None:
    if by != CONTRADICTED:
        return
    options = f"--teacher.prediction {measured.prediction_type}"
    if measured.zero_terminal_snr is not None:
        options += f" --teacher.zero-terminal-snr {str(measured.zero_terminal_snr).lower()}"
    repair = ", or repair its scheduler_config.json" if Path(source.location).is_dir() else ""  # a file has none
    raise Refused(
        f"teacher: {source.location}: its files state {stated}, its network answers as {measured.text} - "
        f"say {options}{repair}"
    )


def _warning(source: TeacherSource, by: str, measured: MeasuredPrediction, option: str) -> list[str]:
    if by != CHOSEN_AGAINST:
        return []
    return [f"teacher: {source.location}: warning: {option} is taken, but its network answers as {measured.text}"]
