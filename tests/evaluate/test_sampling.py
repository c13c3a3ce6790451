from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stages.nets.student import Student
from stages.nets.teacher import Teacher
from stages.sampling.fields import TwoBranchField
from stages.sampling.grids import fixed_noise, fixed_noises, make_sheet, read_settings, save_sheet
from stages.sampling.sampler import Sampler, sample_student, sample_teacher

B, C, H, W = 2, 3, 4, 5


def constant(cond: float, uncond: float) -> TwoBranchField:
    """A field whose branches are constant."""
    return TwoBranchField(lambda x, s, *_: (torch.full_like(x, cond), torch.full_like(x, uncond)))


def sample(sampler: Sampler, field: TwoBranchField) -> torch.Tensor:
    return sampler.sample(field, torch.zeros(B, 1, 1), torch.zeros(1, 1, 1), fixed_noises(0, B, (C, H, W)))


@pytest.mark.parametrize(("guidance", "velocity"), [(0.0, 1.0), (1.0, 2.0), (3.0, 4.0)])
def test_guidance_goes_from_one_branch_through_the_other(guidance: float, velocity: float) -> None:
    drawn = sample(Sampler(steps=3, guidance=guidance), constant(2.0, 1.0))
    assert torch.allclose(drawn, fixed_noises(0, B, (C, H, W)) - velocity, atol=1e-6)


def test_guidance_one_is_the_conditional_branch(student: Student, teacher: Teacher) -> None:
    cond, noise = teacher.encode_texts(["a red star"]), fixed_noises(0, 1, (4, 8, 8))
    one, other = (
        sample_student(student, cond, teacher.encode_texts([uncond]), noise, Sampler(steps=2, guidance=1.0))
        for uncond in ("", "a large blue ring")
    )
    assert torch.allclose(one, other, atol=1e-5)


def test_batches_change_nothing(student: Student, teacher: Teacher) -> None:
    cond, uncond = teacher.encode_texts(["a red star", "a blue ring", "a green moon"]), teacher.encode_texts([""])
    noise = fixed_noises(0, 3, (4, 8, 8))
    together, apart = (
        sample_student(student, cond, uncond, noise, Sampler(steps=2, batch_size=size)) for size in (3, 2)
    )
    assert torch.allclose(together, apart, atol=1e-5)


def test_heun_is_exact_where_velocity_is_linear_in_time() -> None:
    field = TwoBranchField(lambda x, s, *_: (s.float().reshape(-1, 1, 1, 1).expand_as(x),) * 2)
    exact = fixed_noises(0, B, (C, H, W)) - 0.5
    assert torch.allclose(sample(Sampler(steps=2, solver="heun"), field), exact, atol=1e-6)
    assert not torch.allclose(sample(Sampler(steps=2), field), exact, atol=1e-2)


def test_teacher_is_evaluated_at_its_own_states_only(teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    times: list[float] = []
    predict = teacher.predict

    def recording(x: torch.Tensor, s: torch.Tensor, *rest: torch.Tensor) -> object:
        times.extend(s.tolist())
        return predict(x, s, *rest)

    monkeypatch.setattr(teacher, "predict", recording)
    noise = fixed_noises(0, 1, (4, 8, 8))
    sample_teacher(
        teacher, teacher.encode_texts(["a"]), teacher.encode_texts([""]), noise, Sampler(steps=5, solver="heun")
    )
    own = {1.0, *teacher.bridge.s_table.tolist()}
    assert len(times) == 5
    assert set(times) <= own


def test_noise_never_depends_on_how_many_are_requested() -> None:
    few, many = fixed_noises(3, 2, (C, H, W)), fixed_noises(3, 5, (C, H, W))
    assert torch.equal(few, many[:2])
    assert torch.equal(many[4], fixed_noise(3, 4, (C, H, W)))
    assert len({float(noise.sum()) for noise in [*many, fixed_noise(4, 0, (C, H, W))]}) == 6


def test_sheet_shows_tiny_pictures_doubled_and_holds_its_settings(tmp_path: Path) -> None:
    pictures = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)])
    path = tmp_path / "sheet.png"
    save_sheet(make_sheet(["first", "second"], ["one"], [pictures]), path, {"seed": 7, "texts": ["für"]})
    assert read_settings(path) == {"seed": 7, "texts": ["für"]}
    with Image.open(path) as image:
        pixels = np.asarray(image)[20:, 180:]
    assert (pixels == 0).all(axis=2).sum() == 16 * 16
    assert [file.name for file in tmp_path.iterdir()] == ["sheet.png"]
