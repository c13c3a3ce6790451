import pytest
import torch

from stages.evaluate.fields import teacher_field
from stages.evaluate.grid import fixed_noises
from stages.evaluate.paired import Reference, Task, make_reference, paired_error, relative_error
from stages.evaluate.sample import Sampler
from stages.nets.teacher import Teacher


@pytest.fixture(scope="module")
def task(teacher: Teacher) -> Task:
    texts = ["a small red star", "a large blue ring", "a purple heart", "a green moon"]
    return Task(teacher.encode(texts), teacher.encode([""]), fixed_noises(0, 4, (4, 8, 8)))


@pytest.fixture(scope="module")
def reference(teacher: Teacher, task: Task) -> Reference:
    other = fixed_noises(1, 4, (4, 8, 8))
    return make_reference(teacher_field(teacher), task, other, Sampler(guidance=3.0), (2, 6), reference_steps=12)


def test_teachers_own_field_scores_zero_at_any_number_of_steps(teacher: Teacher, reference: Reference) -> None:
    for steps in (2, 6):
        error = paired_error(teacher_field(teacher), reference, steps)
        assert error.student == pytest.approx(error.floor)
        assert error.score == pytest.approx(0, abs=1e-6)


def test_teachers_pictures_of_other_noise_score_one(teacher: Teacher, reference: Reference, task: Task) -> None:
    other = Task(task.cond, task.uncond, fixed_noises(1, 4, (4, 8, 8)))
    drawn = other.draw(teacher_field(teacher), Sampler(guidance=3.0, steps=12))
    assert reference.judge(drawn, 6).score == pytest.approx(1, abs=1e-6)


def test_reference_itself_has_no_error(reference: Reference) -> None:
    assert reference.error(reference.x0) == 0


def test_floor_falls_with_the_steps(reference: Reference) -> None:
    assert 0 < reference.floors[6] < reference.floors[2]


def test_no_score_where_the_teachers_own_floor_is_above_the_ceiling(task: Task) -> None:
    x0 = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    found = Reference(task, Sampler(), x0, ceiling=0.5, floors={4: 0.6}).judge(2 * x0, 4)
    assert found.score is None
    assert found.student == pytest.approx(float(x0.square().mean() / x0.var(correction=0)), rel=1e-6)


def test_error_is_free_of_the_scale_of_latents() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 2, 3, 4, 5, generator=generator)
    assert relative_error(7 * a, 7 * b) == pytest.approx(relative_error(a, b), rel=1e-6)


def test_wrong_prompts_are_farther_than_the_right_ones(teacher: Teacher, reference: Reference, task: Task) -> None:
    right = paired_error(teacher_field(teacher), reference, 6)
    wrong = paired_error(teacher_field(teacher), reference, 6, cond=task.cond.roll(1, 0))
    assert wrong.student > right.student
