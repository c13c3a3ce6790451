from pathlib import Path

import pytest
from diffusers import UNet2DConditionModel
from rich.console import Console

from stages.convert.starts import Models, make_start
from stages.convert.stored import read_result, to_json
from stages.convert.verdict import POLISHED, Verdict, measure_verdict
from stages.nets.student import Student
from stages.sampling.sampler import Sampler
from stages.tiny import anatomy
from tests.convert.conftest import MakeModels, perturbed

TEXTS = ("a small red star", "a large blue ring")


@pytest.fixture(scope="module")
def models(base: UNet2DConditionModel, make_models: MakeModels) -> Models:
    return make_models(perturbed(base, 0.05, seed=2))


@pytest.fixture(scope="module")
def verdict(models: Models) -> Verdict:
    """With the delta itself as the polished student."""
    polished = make_start("delta", models).eval()
    return measure_verdict(models, polished, TEXTS, 1, Sampler(guidance=3.0), steps=(1, 2))


def test_each_student_is_measured_at_each_number_of_steps(verdict: Verdict) -> None:
    assert list(verdict.errors) == ["base", "graft", "delta", POLISHED]
    assert all([error.steps for error in errors] == [1, 2] for errors in verdict.errors.values())
    assert (verdict.size, verdict.prompts, verdict.tail) == ("64x64", 2, "hold")
    floors = {(error.floor, error.ceiling) for errors in verdict.errors.values() for error in errors}
    assert len(floors) == 2  # one for each number of steps, shared by all students


def test_the_same_student_differs_in_nothing(verdict: Verdict) -> None:
    assert verdict.errors[POLISHED] == verdict.errors["delta"]
    for compared in verdict.comparisons["delta"]:
        assert (compared.difference, compared.ratio) == (0, 1)
        assert compared.ratio_interval == (1, 1)


def test_a_comparison_is_that_of_the_two_errors(verdict: Verdict) -> None:
    assert set(verdict.comparisons) == {"base", "graft", "delta"}
    for name, compared in verdict.comparisons.items():
        for one, own, other in zip(compared, verdict.errors[POLISHED], verdict.errors[name], strict=True):
            assert one.steps == own.steps == other.steps
            assert one.ratio == pytest.approx(own.student / other.student)
            if own.score is not None and other.score is not None:
                assert one.difference == pytest.approx(own.score - other.score)


def test_a_foreign_fine_tune_has_no_delta(make_models: MakeModels, grafted: Student) -> None:
    models = make_models(anatomy.build_unet().eval().requires_grad_(False))
    result = measure_verdict(models, grafted, TEXTS, 1, Sampler(guidance=3.0), steps=(1,))
    assert list(result.errors) == ["base", "graft", POLISHED]


def test_a_verdict_is_stored_and_read_again(verdict: Verdict, tmp_path: Path) -> None:
    path = tmp_path / "convert.json"
    path.write_text(to_json(verdict))
    assert read_result(Verdict, path) == verdict


def test_its_tables_show_every_student_and_comparison(verdict: Verdict) -> None:
    console = Console(width=120, record=True, quiet=True)
    for table in verdict.tables():
        console.print(table)
    assert [table.row_count for table in verdict.tables()] == [8, 6]
