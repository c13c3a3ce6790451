"""Students of few steps: their field, their sampler, and their evaluation at their own steps."""

import io
import json
from contextlib import redirect_stdout
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from stages import __main__ as cli
from stages.flow.windows import window_ends
from stages.nets.guidance import embed_guidance, fold_guidance
from stages.nets.student import Student
from stages.nets.teacher import Teacher
from stages.sampling.fields import student_field
from stages.sampling.grids import fixed_noises
from stages.sampling.sampler import Sampler, sample_student
from stages.sampling.solvers import supported_solvers
from stages.system.refusal import Refused
from tests.few_steps import RANGE, load_teacher, make_fast_run, make_fast_student

NOISE = fixed_noises(0, 2, (4, 8, 8))
FEW = ["--paired.prompts", "3", "--paired.reference-steps", "6", "--fidelity.prompts", "2", "--fidelity.steps", "3"]
FEW += ["--fidelity.control-prompts", "1", "--config", "configs/tiny.yaml"]


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return Teacher(load_teacher(), "hold")


@pytest.fixture(scope="module")
def student(teacher: Teacher) -> Student:
    return make_fast_student(teacher.components)


@pytest.fixture(scope="module")
def conds(teacher: Teacher) -> tuple[torch.Tensor, torch.Tensor]:
    return teacher.encode_texts(["a small red star", "a large blue ring"]), teacher.uncond


def test_a_step_of_each_window_is_taken_at_whole_times(
    student: Student, conds: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    velocity = student.velocity

    def recording(x: torch.Tensor, s: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        seen.append(1000 * float(s[0]))
        return velocity(x, s, *rest)

    monkeypatch.setattr(student, "velocity", recording)
    drawn = sample_student(student, *conds, NOISE, Sampler(), 8, RANGE)
    assert seen == pytest.approx([999, 874, 749, 624, 499, 374, 249, 124], abs=1e-9)
    x = NOISE
    ends = window_ends(8).tolist()
    with torch.inference_mode():
        for s, s_next in pairwise(ends):
            time = torch.full((2,), int(1000 * s + 1e-6) / 1000, dtype=torch.float64)
            x = x + (s_next - s) * velocity(x, time, conds[0], torch.full((2,), 5.0))
    assert torch.allclose(drawn, x, atol=1e-6)


def test_rows_may_have_scales_of_their_own(student: Student, conds: tuple[torch.Tensor, torch.Tensor]) -> None:
    field, s = student_field(student, None, 4, RANGE), torch.full((2,), 0.5, dtype=torch.float64)
    with torch.inference_mode():
        both = field.velocity(NOISE, s, *conds, torch.tensor([3.0, 8.0]))
        for row, scale in enumerate((3.0, 8.0)):
            assert torch.allclose(both[row], field.velocity(NOISE, s, *conds, scale)[row], atol=1e-5)


def test_a_folded_network_is_the_field_at_its_scale(student: Student, conds: tuple[torch.Tensor, torch.Tensor]) -> None:
    folded = Student(fold_guidance(student.unet, 6.5)).eval()
    inside = sample_student(student, *conds, NOISE, Sampler(guidance=6.5), 2, RANGE)
    assert torch.allclose(inside, sample_student(folded, *conds, NOISE, Sampler(guidance=6.5), 2), atol=1e-4)


def test_the_field_has_no_branches_and_one_solver(student: Student, conds: tuple[torch.Tensor, torch.Tensor]) -> None:
    field = student_field(student, None, 4, RANGE)
    assert supported_solvers(field) == ("euler",)
    with pytest.raises(TypeError, match="no branches"):
        field.branches(NOISE, torch.ones(2), *conds)


def test_a_student_that_takes_the_scale_is_never_sampled_without_its_windows(student: Student) -> None:
    with pytest.raises(AssertionError):
        student_field(student)


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        (Sampler(steps=8), "sampler.steps 8"),
        (Sampler(solver="unipc"), "sampler.solver unipc"),
        (Sampler(shift=2.0), "sampler.shift 2"),
        (Sampler(guidance=2.9), "sampler.guidance 2.9"),
    ],
)
def test_a_sampler_of_another_way_is_refused(
    student: Student, conds: tuple[torch.Tensor, torch.Tensor], sampler: Sampler, message: str
) -> None:
    with pytest.raises(Refused, match=message):
        sample_student(student, *conds, NOISE, sampler, 4, RANGE)


def test_the_untrained_input_changes_no_picture(teacher: Teacher, conds: tuple[torch.Tensor, torch.Tensor]) -> None:
    student = Student(embed_guidance(teacher.components.unet)).eval()
    one, other = (sample_student(student, *conds, NOISE, Sampler(guidance=w), 2) for w in (3.0, 8.0))
    assert torch.equal(one, other)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 2 windows, exported and measured."""
    run = tmp_path_factory.mktemp("home") / "fast" / "2"
    make_fast_run(run, windows=2)
    assert cli.main(["export", str(run)]) == 0
    with redirect_stdout(io.StringIO()) as shown:
        assert cli.main(["evaluate", str(run), *FEW]) in (0, 1)
    (run / "shown.txt").write_text(shown.getvalue())
    return run


def test_an_evaluation_is_at_the_students_own_steps(evaluated: Path) -> None:
    evaluation = json.loads((evaluated / "evaluation.json").read_text())
    assert {name: [error["steps"] for error in errors] for name, errors in evaluation["paired"].items()} == {
        name: [2] for name in ("student", "undistilled graft", "undistilled copy", "wrong prompts")
    }
    assert evaluation["velocity"] is None
    assert set(evaluation["fidelity"]) == {"teacher", "student", "student as a noise model"}
    errors = {name: errors[0]["student"] for name, errors in evaluation["paired"].items()}
    assert errors["student"] < errors["wrong prompts"]


def test_an_evaluation_says_what_it_leaves_out(evaluated: Path) -> None:
    shown = (evaluated / "shown.txt").read_text()
    assert "at its 2 steps alone" in shown
    assert "velocity errors are left out" in shown


def test_the_card_shows_the_evaluation(evaluated: Path, tmp_path: Path) -> None:
    assert cli.main(["export", str(evaluated), "--single-file", "false", "--out", str(tmp_path)]) == 0
    card = (tmp_path / "diffusers" / "README.md").read_text()
    assert "Paired-noise error" in card
    assert "| student | 2 | " in card
