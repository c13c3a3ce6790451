"""The schedule of a teacher: what its files and its user say, against the config of its scheduler."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stages.flow.schedule import NoiseSchedule
from stages.system.refusal import Refused
from stages.teacher_files.assembly import Assembly
from stages.teacher_files.checkpoint.kinds import Contents
from stages.teacher_files.folder import read_json
from stages.teacher_files.source import TeacherSource

RESCALE_KEY = "rescale_betas_zero_snr"
RESCALING_SCHEDULER = "DDIMScheduler"
"""Reads `RESCALE_KEY`; SD1.5's own PNDM does not."""
RESCALING_SCHEDULERS = (
    RESCALING_SCHEDULER, "DDPMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "LCMScheduler",
    "DDIMParallelScheduler", "DDPMParallelScheduler", "TCDScheduler", "UniPCMultistepScheduler",
    "DPMSolverMultistepScheduler",
)  # fmt: skip
ROUNDINGS, RELATIVE, ABSOLUTE = 4.0, 1e-4, 1e-6
"""Tolerance of a stored table of a schedule: roundings of its type, or of a product of a thousand numbers."""


def read_buffers(contents: Contents, made: Assembly, subject: str, remedy: str) -> None:
    """Compare the tables of a file's schedule with the config's: equal ones say nothing, rescaled ones say so.

    Raises `Refused`, beginning with `subject` and ending with `remedy`, for a table of any other schedule.
    """
    if not contents.buffers:
        return
    alpha_bar, tolerance = _stored_alpha_bar(contents)
    config = read_json(made.configs / "scheduler" / "scheduler_config.json")
    for rescaled in (bool(config.get(RESCALE_KEY)), not config.get(RESCALE_KEY)):
        any_prediction = {**config, "prediction_type": "v_prediction", RESCALE_KEY: rescaled}
        expected = NoiseSchedule.from_config(any_prediction).alpha_bar
        if expected.shape == alpha_bar.shape and torch.allclose(alpha_bar, expected, tolerance, ABSOLUTE):
            if rescaled != bool(config.get(RESCALE_KEY)):
                made.stated.setdefault("zero_terminal_snr", rescaled)
                made.notes.append(f"{subject}: its schedule (alphas_cumprod) {_SNR_TEXT[rescaled]}, which is taken")
            return
    table = f"from {float(alpha_bar[0]):.5f} to {float(alpha_bar[-1]):.5f} in {len(alpha_bar)} steps"
    raise Refused(f"{subject}: its schedule (alphas_cumprod {table}) is not that of {made.configs} - {remedy}")


_SNR_TEXT = {True: "ends without signal (zero terminal SNR)", False: "keeps some signal at its end"}


def _stored_alpha_bar(contents: Contents) -> tuple[Tensor, float]:
    """The signal shares of a file's schedule in float64, and a relative tolerance of them."""
    name = "alphas_cumprod" if "alphas_cumprod" in contents.buffers else "betas"
    stored = contents.buffers[name].read().flatten()
    eps = torch.finfo(stored.dtype).eps if stored.dtype.is_floating_point else 0.0
    values = stored.double()
    return values if name == "alphas_cumprod" else (1 - values).cumprod(0), max(ROUNDINGS * eps, RELATIVE)


def apply_schedule(source: TeacherSource, made: Assembly) -> None:
    """Put what the user or a single file says of prediction and schedule into the config of the scheduler.

    A schedule without signal at its end is one of v: of epsilon such a step says nothing (Lin et al. 2023).
    """
    stated = made.stated if made.folder is None else {}
    prediction = stated.get("prediction_type") if source.prediction == "auto" else source.prediction
    rescaled = stated.get("zero_terminal_snr")
    if source.zero_terminal_snr != "auto":
        rescaled = source.zero_terminal_snr == "true"
    if prediction is None and rescaled is None:
        return
    if source.prediction == "epsilon" and source.zero_terminal_snr == "auto":
        rescaled = False
    if rescaled and prediction is None:
        prediction = "v_prediction"
    config = made.part("scheduler").config
    wanted = {"prediction_type": prediction, RESCALE_KEY: rescaled}
    present = {"prediction_type": config.get("prediction_type", "epsilon"), RESCALE_KEY: bool(config.get(RESCALE_KEY))}
    changes = {key: value for key, value in wanted.items() if value is not None and value != present[key]}
    if not changes:
        return
    settings: dict[str, Any] = dict(changes)
    if changes.get(RESCALE_KEY) and config.get("_class_name") not in RESCALING_SCHEDULERS:
        settings["_class_name"] = RESCALING_SCHEDULER
    made.put(replace(made.part("scheduler"), settings=settings, changes=changes))
    made.notes.append(f"teacher: {source.location}: {', '.join(f'{key} is {value}' for key, value in changes.items())}")
