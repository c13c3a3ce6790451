import pytest
import torch

from stages.evaluate.paired import (
    PairedError,
    PairedInputs,
    TeacherReference,
    make_reference,
    paired_error,
    relative_errors,
    teacher_reference,
)
from stages.nets.teacher import Teacher
from stages.sampling.fields import teacher_field
from stages.sampling.grids import fixed_noises
from stages.sampling.sampler import Sampler


@pytest.fixture(scope="module")
def task(teacher: Teacher) -> PairedInputs:
    texts = ["a small red star", "a large blue ring", "a purple heart", "a green moon"]
    return PairedInputs(teacher.encode_texts(texts), teacher.encode_texts([""]), fixed_noises(0, 4, (4, 8, 8)))


@pytest.fixture(scope="module")
def reference(teacher: Teacher, task: PairedInputs) -> TeacherReference:
    other = fixed_noises(1, 4, (4, 8, 8))
    return make_reference(teacher_field(teacher), task, other, Sampler(guidance=3.0), (2, 6), reference_steps=12)


def test_teachers_own_field_scores_zero_at_any_number_of_steps(teacher: Teacher, reference: TeacherReference) -> None:
    for steps in (2, 6):
        error = paired_error(teacher_field(teacher), reference, steps)
        assert error.student == pytest.approx(error.floor)
        assert error.score == pytest.approx(0, abs=1e-6)


def test_teachers_pictures_of_other_noise_score_one(
    teacher: Teacher, reference: TeacherReference, task: PairedInputs
) -> None:
    other = PairedInputs(task.cond, task.uncond, fixed_noises(1, 4, (4, 8, 8)))
    drawn = other.sample(teacher_field(teacher), Sampler(guidance=3.0, steps=12))
    assert reference.compare(drawn, 6).score == pytest.approx(1, abs=1e-6)


def test_reference_itself_has_no_error(reference: TeacherReference) -> None:
    assert float(relative_errors(reference.x0, reference.x0).sum()) == 0


def test_floor_falls_with_the_steps(reference: TeacherReference) -> None:
    assert 0 < reference.floors[6].mean() < reference.floors[2].mean()


def test_no_score_where_the_teachers_own_floor_is_above_the_ceiling(task: PairedInputs) -> None:
    x0 = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    result = TeacherReference(task, Sampler(), x0, torch.tensor([0.4, 0.6]), {4: torch.tensor([0.7, 0.5])}).compare(
        2 * x0, 4
    )
    assert result.score is None
    assert result.student == pytest.approx(float(x0.square().mean() / x0.var(correction=0)), rel=1e-6)


def test_error_is_free_of_the_scale_of_latents() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 2, 3, 4, 5, generator=generator)
    torch.testing.assert_close(relative_errors(7 * a, 7 * b), relative_errors(a, b), rtol=1e-6, atol=0)


def test_the_interval_holds_the_score_and_narrows_with_the_pictures(task: PairedInputs) -> None:
    def error_of(count: int) -> PairedError:
        generator = torch.Generator().manual_seed(0)
        x0, noise = torch.randn(2, count, 3, 4, 5, generator=generator)
        ceiling, floor = torch.full((count,), 1.0), torch.zeros(count)
        spread = torch.rand(count, 1, 1, 1, generator=generator)
        return TeacherReference(task, Sampler(), x0, ceiling, {4: floor}).compare(x0 + spread * noise, 4)

    few, many = error_of(10), error_of(400)
    for result in (few, many):
        assert result.interval is not None
        assert result.score is not None
        assert result.interval[0] < result.score < result.interval[1]
    assert many.interval[1] - many.interval[0] < 0.5 * (few.interval[1] - few.interval[0])


def test_wrong_prompts_are_farther_than_the_right_ones(
    teacher: Teacher, reference: TeacherReference, task: PairedInputs
) -> None:
    right = paired_error(teacher_field(teacher), reference, 6)
    wrong = paired_error(teacher_field(teacher), reference, 6, cond=task.cond.roll(1, 0))
    assert wrong.student > right.student


def reference_of(ceiling: torch.Tensor, floor: torch.Tensor, task: PairedInputs) -> TeacherReference:
    return TeacherReference(task, Sampler(), torch.zeros(len(ceiling), 3, 4, 5), ceiling, {4: floor})


def test_two_fields_are_compared_on_the_same_resampled_pictures(task: PairedInputs) -> None:
    """One half as wrong as the other on every picture: the ratio has no spread, though single errors have much."""
    errors = torch.rand(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 4
    reference = reference_of(torch.ones(40, dtype=torch.float64), torch.zeros(40, dtype=torch.float64), task)
    result = reference.compare_fields(errors / 2, errors, 4)
    assert result.ratio == pytest.approx(0.5)
    assert result.ratio_interval == pytest.approx((0.5, 0.5))
    assert result.difference == pytest.approx(-float(errors.mean()) / 2)
    assert result.difference_interval is not None
    assert result.difference_interval[0] < result.difference < result.difference_interval[1] < 0


def test_a_comparison_turns_round_with_its_fields(task: PairedInputs) -> None:
    generator = torch.Generator().manual_seed(0)
    one, other, floor = torch.rand(3, 30, generator=generator, dtype=torch.float64)
    reference = reference_of(torch.full((30,), 2.0, dtype=torch.float64), floor, task)
    there, back = reference.compare_fields(one, other, 4), reference.compare_fields(other, one, 4)
    scores = [reference.summarise(errors, 4).score for errors in (one, other)]
    assert scores[0] is not None
    assert scores[1] is not None
    assert there.difference == pytest.approx(scores[0] - scores[1])
    assert there.difference == pytest.approx(-(back.difference or 0))
    assert there.difference_interval is not None
    assert back.difference_interval is not None
    assert there.difference_interval == pytest.approx(tuple(-end for end in reversed(back.difference_interval)))
    assert there.ratio == pytest.approx(1 / back.ratio)


def test_no_difference_of_scores_where_there_is_no_score(task: PairedInputs) -> None:
    reference = reference_of(torch.full((5,), 0.1), torch.full((5,), 0.2), task)
    result = reference.compare_fields(torch.full((5,), 0.3), torch.full((5,), 0.6), 4)
    assert (result.difference, result.difference_interval) == (None, None)
    assert result.ratio == pytest.approx(0.5)


def test_a_longer_list_of_texts_begins_with_the_same_pictures(teacher: Teacher) -> None:
    texts, size = ["a red star", "a blue ring", "a green moon"], teacher.components.native_size
    short, long = (
        teacher_reference(teacher, texts[:n], 7, Sampler(guidance=3.0), size, (2,), reference_steps=3) for n in (2, 3)
    )
    torch.testing.assert_close(long.x0[:2], short.x0, rtol=1e-3, atol=1e-3)
    assert torch.equal(long.inputs.noise[:2], short.inputs.noise)
