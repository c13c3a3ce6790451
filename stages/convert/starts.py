"""From where a fine-tune's flow model is trained: the starts, and the probe that measures which is nearest."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch

from configs.values import PictureSize
from stages.convert.delta import add_difference, refuse_other_anatomy, relative_distance
from stages.evaluate.paired import PairedError, teacher_reference
from stages.nets.components import Components
from stages.nets.graft import graft_time_embedding
from stages.nets.run_folder import SavedRun, load_student
from stages.nets.student import Student
from stages.nets.teacher import Teacher
from stages.sampling.fields import student_field
from stages.sampling.sampler import Sampler
from stages.system.refusal import Refused
from stages.teacher_files.mix.weights import FAR_DISTANCE

StartName: TypeAlias = Literal["delta", "graft"]
"""delta: the base's student and what the fine-tune changed; graft: the fine-tune with its time embedding re-solved."""

START_NAMES: tuple[StartName, ...] = get_args(StartName)
BASE = "base"
"""In tables: the base's student, unchanged."""
SCHEDULE_TOLERANCE = 1e-5
"""Relative difference of signal shares that rounded betas make."""


@dataclass(frozen=True)
class Models:
    """What every start is made from; the base's teacher gives weights alone, so that it may stay on the CPU."""

    base: SavedRun
    base_teacher: Components
    teacher: Teacher
    """The fine-tune."""
    polished_sizes: tuple[PictureSize, ...] = ()
    """The picture sizes of the polish, the most frequent first; empty for those that the base learnt."""

    @property
    def size(self) -> PictureSize:
        """The size at which students are measured: of those of the polish the fine-tune's own, or the first."""
        native = self.teacher.components.native_size
        sizes = self.polished_sizes or self.base.origin.learnt_sizes(self.base_teacher.native_size)
        return native if native in sizes else sizes[0]


@dataclass(frozen=True)
class Probe:
    """How near each start comes to the fine-tune before any training."""

    distance: float
    """Of the fine-tune's UNet from that of the base's teacher, by `relative_distance`."""
    note: str
    """What is unusual, on one line; empty for nothing."""
    errors: Mapping[str, PairedError]
    """Of each start that was tried, and of the base's student unchanged."""
    best: StartName


def make_start(name: StartName, models: Models) -> Student:
    """A trainable student in fp32 on the fine-tune's device; raises `Refused` where it cannot be made."""
    unet = models.teacher.components.unet
    if name == "graft":
        student = Student.from_teacher(unet)
        graft_time_embedding(student.unet, models.teacher.bridge)
        return student
    student = load_base_student(models)
    add_difference(student, models.base_teacher.unet, unet)
    return student.requires_grad_(True)


def load_base_student(models: Models) -> Student:
    """The base's student, frozen, with the fine-tune's config and on its device.

    Raises `Refused` for a base of another anatomy, and for one that predicts no velocity.
    """
    if models.base.origin.target != "velocity":
        raise Refused(
            f"--base: {models.base.folder}: its student predicts {models.base.origin.target}, not a velocity - "
            "name a run that was distilled with target velocity"
        )
    refuse_other_anatomy(models.base_teacher.unet, models.teacher.components.unet, "the fine-tune")
    return load_student(models.base, models.teacher.components)


def delta_obstacle(models: Models, distance: float) -> str:
    """Why the difference of the two teachers means nothing, on one line; empty where it does."""
    if models.base.origin.scratch:
        return "the base's student began with random weights, not with its teacher's"
    own, other = models.base_teacher.schedule, models.teacher.components.schedule
    if own.prediction_type != other.prediction_type:
        return f"it predicts {other.prediction_type}, the base's teacher {own.prediction_type}"
    if own.steps != other.steps or not torch.allclose(own.alpha_bar, other.alpha_bar, rtol=SCHEDULE_TOLERANCE):
        return "its noise schedule is not that of the base's teacher"
    if not distance < FAR_DISTANCE:
        return (
            f"it lies {distance:.2f} from the base's teacher, where fine-tunes lie below {FAR_DISTANCE:g} and "
            "unrelated models at 1.41"
        )
    return ""


def usable_starts(models: Models, names: Sequence[StartName], distance: float) -> tuple[list[StartName], str]:
    """The starts of these names that mean something, and what is unusual; `distance` is that of the two teachers.

    A delta that has an obstacle is left out, or refused where it is the only one.
    """
    if "delta" in names and (obstacle := delta_obstacle(models, distance)):
        if len(names) == 1:
            raise Refused(f"--start delta: the fine-tune cannot start from the difference: {obstacle} - take graft")
        return [name for name in names if name != "delta"], f"the fine-tune starts from its own graft: {obstacle}"
    if distance == 0:
        return list(names), "the fine-tune has the UNet of the base's teacher, so that its delta is the base's student"
    return list(names), ""


def probe_starts(
    models: Models, texts: Sequence[str], seed: int, sampler: Sampler, names: Sequence[StartName] = START_NAMES
) -> Probe:
    """Measure the usable ones of the named starts and the base's student, one after another, in the sampler's steps.

    Raises `Refused` as `usable_starts` does, and for a fine-tune none of whose starts yields finite latents.
    """
    distance = relative_distance(models.base_teacher.unet, models.teacher.components.unet)
    tried, note = usable_starts(models, names, distance)
    steps = sampler.steps
    reference = teacher_reference(models.teacher, texts, seed, sampler, models.size, (steps,))

    def measure(student: Student) -> PairedError:
        return reference.summarise(reference.picture_errors(student_field(student), steps), steps)

    errors = {BASE: measure(load_base_student(models))}
    errors |= {name: measure(make_start(name, models).eval()) for name in tried}
    finite = [name for name in tried if math.isfinite(errors[name].student)]
    if not finite:
        raise Refused(f"--start: {', '.join(tried)}: no finite latents in {steps} steps - check the fine-tune's files")
    return Probe(distance, note, errors, min(finite, key=lambda name: errors[name].student))
