from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from shards.batch import Batch
from shards.reader import Reader
from stages.evaluate.metrics import compute_fidelity
from stages.nets.student import Prediction, Student
from stages.nets.teacher import Teacher
from stages.train.validation import velocity_errors


@pytest.fixture
def batch(run_folder: Path) -> Batch:
    return Reader(run_folder.parent / "cache", "validation").batch(np.arange(6))


class FixedStudent(Student):
    """A student with a fixed prediction."""

    def __init__(self, v_cond: torch.Tensor, v_uncond: torch.Tensor) -> None:
        torch.nn.Module.__init__(self)
        self.prediction = Prediction(v_cond.float(), v_uncond.float(), {})

    def forward(self, *_: torch.Tensor) -> Prediction:
        return self.prediction


UNCOND = torch.zeros(1, 24, 64)


def test_right_velocities_have_error_zero_and_zero_velocities_have_error_one(batch: Batch) -> None:
    right = velocity_errors(FixedStudent(batch.v_cond, batch.v_uncond), [batch], UNCOND)
    assert (right.velocity.overall, right.guidance.overall, right.states) == (0, 0, 6)
    zero = velocity_errors(FixedStudent(0 * batch.v_cond, 0 * batch.v_uncond), [batch], UNCOND)
    assert zero.velocity.overall == pytest.approx(1)
    assert zero.guidance.overall == pytest.approx(1)


def test_one_branch_alone_shows_in_both_figures(batch: Batch) -> None:
    result = velocity_errors(FixedStudent(batch.v_cond, 1.1 * batch.v_uncond), [batch], UNCOND)
    share = batch.v_uncond.float().square().sum() / (
        batch.v_uncond.float().square().sum() + batch.v_cond.float().square().sum()
    )
    assert result.velocity.overall == pytest.approx(0.01 * float(share), rel=1e-3)
    assert result.guidance.overall > result.velocity.overall


def test_errors_fall_into_the_bin_of_their_time(batch: Batch) -> None:
    times = replace(batch, s=torch.tensor([0.0, 0.1, 0.3, 0.5, 0.5, 1.0]))
    wrong = times.v_cond.float().clone()
    wrong[5] = 0
    result = velocity_errors(FixedStudent(wrong, times.v_uncond), [times], UNCOND)
    by_bin = result.velocity.by_bin
    assert by_bin[3] is None
    assert by_bin[:3] == (0, 0, 0)
    assert by_bin[4] is not None
    assert by_bin[4] > 0


def test_several_batches_are_one_sum(batch: Batch, student: Student, teacher: Teacher, run_folder: Path) -> None:
    reader = Reader(run_folder.parent / "cache", "validation")
    parts = [reader.batch(np.arange(4)), reader.batch(np.arange(4, 6))]
    whole, apart = (velocity_errors(student, batches, teacher.encode_texts([""])) for batches in ([batch], parts))
    assert whole.velocity.overall == pytest.approx(apart.velocity.overall, rel=1e-4)
    assert whole.velocity.overall > 0


def test_an_attribute_that_the_text_omits_is_never_wrong() -> None:
    def scorer(_texts: Sequence[str], _pictures: torch.Tensor) -> Mapping[str, torch.Tensor]:
        nan = float("nan")
        return {"shape": torch.tensor([1.0, 1, 0, 1]), "place": torch.tensor([nan, 1, 1, 0])}

    result = compute_fidelity(scorer, ["a", "b", "c", "d"], torch.zeros(4, 3, 4, 5))
    assert result.by_attribute == {"shape": pytest.approx(3 / 4), "place": pytest.approx(2 / 3)}
    assert (result.all_at_once, result.pictures) == (0.5, 4)
