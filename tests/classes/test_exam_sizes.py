"""The exam, the probe and the grids of classes at other sizes than the model's own."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from configs.values import PictureSize
from stages.classes.difficulty import probe_classes
from stages.classes.exam import Exam, ExamConfig
from stages.classes.monitor import ClassMonitor
from stages.evaluate.paired import relative_errors
from stages.nets.student import Student
from stages.nets.teacher import Teacher
from stages.prompts import Prompt
from stages.sampling.grids import fixed_noises, read_settings
from stages.sampling.sampler import Sampler, sample_student, sample_teacher
from stages.system.refusal import Refused
from stages.tiny.score import score

TALL, NATIVE = PictureSize(64, 96), PictureSize(64, 64)
PROMPTS = {
    name: [Prompt(f"a {colour} {name}", name, i) for i, colour in enumerate(("red", "blue"))]
    for name in ("star", "ring")
}
CONFIG = ExamConfig(pictures=2, checkpoint_pictures=1, sampler=Sampler(steps=2))


def seen_shapes(shapes: list[tuple[int, ...]]) -> object:
    """A scorer that keeps the shapes of what it judges."""

    def judge(texts: Sequence[str], pictures: Tensor) -> Mapping[str, Tensor]:
        shapes.append(tuple(pictures.shape))
        return {"bright": torch.ones(len(texts))}

    return judge


@pytest.mark.parametrize("size", [None, NATIVE, TALL])
def test_the_exam_compares_pictures_of_its_size_from_the_noises_of_that_shape(
    size: PictureSize | None, teacher: Teacher, student: Student
) -> None:
    shapes: list[tuple[int, ...]] = []
    metrics = Exam(teacher, PROMPTS, seen_shapes(shapes), CONFIG, size=size)(student)  # type: ignore[arg-type]
    shown = size or NATIVE
    assert shapes == [(2, 3, shown.height, shown.width)] * 2
    noise, cond = (
        fixed_noises(7, 2, teacher.components.latent_shape(size)),
        teacher.encode_texts(["a red star", "a blue star"]),
    )
    latents = [
        sample(model, cond, teacher.uncond, noise, CONFIG.sampler)  # type: ignore[operator]
        for sample, model in ((sample_student, student), (sample_teacher, teacher))
    ]
    assert metrics["star"]["paired_error"] == pytest.approx(float(relative_errors(*latents).mean()), rel=1e-5)


def monitor(
    teacher: Teacher, student: Student, folder: Path, sizes: Sequence[PictureSize], scorer: object
) -> ClassMonitor:
    return ClassMonitor(teacher, lambda: student, PROMPTS, {}, scorer, CONFIG, None, folder, sizes)  # type: ignore[arg-type]


def test_the_monitor_examines_at_the_native_size_or_else_the_first_and_shows_all(
    teacher: Teacher, student: Student, tmp_path: Path
) -> None:
    for name, sizes, examined in (("both", (TALL, NATIVE), NATIVE), ("tall", (TALL,), TALL), ("none", (), NATIVE)):
        shapes: list[tuple[int, ...]] = []
        watched = monitor(teacher, student, tmp_path / name, sizes, seen_shapes(shapes))
        shapes.clear()
        watched(student)
        assert {shape[2:] for shape in shapes} == {(examined.height, examined.width)}
        watched.hooks().on_checkpoint(64, student)  # type: ignore[misc]
        settings = read_settings(tmp_path / name / "grids" / "000000064.png")
        assert settings.get("sizes") == ([str(size) for size in sizes] if sizes else None)


def test_a_scorer_that_judges_no_picture_of_the_exam_is_refused_before_training(
    teacher: Teacher, student: Student, tmp_path: Path
) -> None:
    monitor(teacher, student, tmp_path, (TALL, NATIVE), score)
    with pytest.raises(Refused, match=r"scorer: it judges no picture of 64x96 - .* render\.sizes hold 64x64"):
        monitor(teacher, student, tmp_path, (TALL,), score)


def test_classes_are_probed_at_the_wanted_size(teacher: Teacher, student: Student) -> None:
    shapes: list[tuple[int, ...]] = []
    sampler = Sampler(steps=2, batch_size=3)
    errors = {
        size: probe_classes(student, teacher, PROMPTS, 1, sampler, seen_shapes(shapes), size)  # type: ignore[arg-type]
        for size in (None, NATIVE, TALL)
    }
    assert torch.equal(errors[None].paired_errors, errors[NATIVE].paired_errors)
    assert not torch.equal(errors[TALL].paired_errors, errors[NATIVE].paired_errors)
    assert {shape[2:] for shape in shapes} == {(64, 64), (96, 64)}
