"""Distances and straightness of a run's student and its teacher, from the pictures of the paired errors."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from jaxtyping import Float
from torch import Tensor

from configs.values import PictureSize
from stages.evaluate.distances.columns import (
    Column,
    Distances,
    Measures,
    PictureSet,
    make_column,
    make_floor,
    unit_of,
)
from stages.evaluate.distances.folders import PictureFolder
from stages.evaluate.metrics import Fidelity, fidelity_of
from stages.evaluate.stored import StoredInputs
from stages.evaluate.straightness import MAX_PICTURES, Straightness, curvature_terms, relative_curvature
from stages.nets.teacher import Teacher
from stages.sampling.fields import TwoBranchField
from stages.sampling.sampler import Sampler
from stages.system.refusal import Refused, format_value

DECODED_TOGETHER = 16


@dataclass(frozen=True)
class Subjects:
    """Teacher and student as they are sampled at one size, from one list of prompts and noises."""

    teacher: Teacher
    teacher_field: TwoBranchField
    student_field: TwoBranchField
    inputs: StoredInputs
    other_noise: Float[Tensor, "b c h w"]
    sampler: Sampler
    """Its steps are not used."""
    steps: Sequence[int]
    reference_steps: int

    def sampler_of(self, steps: int) -> Sampler:
        """The student's sampler."""
        return self.sampler.model_copy(update={"steps": steps})

    def read(self, measures: Measures, field: TwoBranchField, steps: int, inputs: StoredInputs) -> PictureSet:
        """The readings of the pictures of a field."""

        def decoded() -> Iterator[Tensor]:
            sampler = self.sampler_of(steps)
            sampler = sampler if field.continuous_time else sampler.for_teacher
            for latents in inputs.sample(field, sampler).split(DECODED_TOGETHER):
                yield self.teacher.decode_latents(latents).cpu()

        return measures.read(inputs.texts, decoded())


def measure_distances(
    subjects: Subjects, measures: Measures, folders: Mapping[PictureFolder, PictureSet], names: tuple[str, str]
) -> Distances:
    """Teacher and student, by these names, at each number of steps, and every folder, against the teacher's pictures.

    These are of the same prompts from other noises, at the reference's steps.
    """
    inputs, reference_steps = subjects.inputs, subjects.reference_steps
    teacher, student = subjects.teacher_field, subjects.student_field
    other = replace(inputs, noise=subjects.other_noise)
    reference = subjects.read(measures, teacher, reference_steps, other)
    unit = unit_of(reference, measures.features.name if measures.features else "")
    reference = reference.in_units(unit)
    own = subjects.read(measures, teacher, reference_steps, inputs).in_units(unit)
    columns: dict[str, Sequence[Column]] = {}
    for name, field in zip(names, (teacher, student), strict=True):
        read = [(n, subjects.read(measures, field, n, inputs)) for n in subjects.steps]
        columns[name] = [make_column(pictures.in_units(unit), reference, n) for n, pictures in read]
    columns[names[0]] = [*columns[names[0]], make_column(own, reference, reference_steps)]
    for folder, pictures in folders.items():
        rows, of_folder = folder.rows_of(inputs.texts)
        if len(rows) < 2:
            columns[folder.name] = [make_column(replace(pictures, features=None), reference)]
            continue
        floor = make_floor(own.rows(rows), reference.rows(rows)) if len(rows) < own.count else None
        columns[folder.name] = [make_column(pictures.rows(of_folder).in_units(unit), reference.rows(rows), floor=floor)]
    return Distances(
        measures.features.name if measures.features else None,
        None if own.features is None else own.features.shape[1],
        f"the teacher's pictures of the same prompts from other noises, {reference_steps} steps",
        make_floor(own, reference),
        columns,
        list(inputs.texts),
    )


def refuse_foreign_prompts(folders: Sequence[PictureFolder], texts: Sequence[str], measures: Measures) -> None:
    """Raise `Refused` for a folder of which no distance can be measured, and for folders of which nothing can be."""
    if folders and measures == Measures():
        raise Refused("pictures: nothing is measured of them - name features, a clip model or a scorer")
    for folder in folders:
        if measures.features and (shared := len(folder.rows_of(texts)[0])) < 2:
            raise Refused(
                f"pictures: {folder.name}: {shared} of its {len(folder.files)} prompts are among the {len(texts)} that "
                f"are measured, two are the least - sample those (the first: {format_value(texts[0])}), or leave "
                "features out"
            )


def read_folders(
    folders: Sequence[PictureFolder], measures: Measures, size: PictureSize
) -> dict[PictureFolder, PictureSet]:
    """The readings of every picture of each folder."""
    return {one: measures.read(one.texts, one.batches(range(len(one.files)), size)) for one in folders}


def folder_fidelity(folders: Mapping[PictureFolder, PictureSet]) -> dict[str, Fidelity]:
    """The scorer's shares of every folder, of all its pictures."""
    return {folder.name: fidelity_of(pictures.scores) for folder, pictures in folders.items() if pictures.scores}


def measure_straightness(subjects: Subjects, names: tuple[str, str]) -> Straightness:
    """The curvature of teacher and student at the reference's steps, a student of few steps at its own."""
    inputs = subjects.inputs.rows(slice(0, MAX_PICTURES))
    steps, relative = dict[str, int](), dict[str, float]()
    for name, field in zip(names, (subjects.teacher_field, subjects.student_field), strict=True):
        steps[name] = field.windows or subjects.reference_steps
        sampler = subjects.sampler.for_teacher.model_copy(update={"steps": steps[name]})
        terms = inputs.stored("curvature", field, sampler, partial(curvature_terms, field, sampler=sampler))
        relative[name] = relative_curvature(terms)
    return Straightness(len(inputs.noise), steps, relative)
