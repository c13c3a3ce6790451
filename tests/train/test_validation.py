"""Held-out states, seen states and the same under new noise, of a cache whose teacher is a formula."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from configs.values import PictureSize
from shards.manifest import Recipe
from shards.reader import Reader
from shards.record import BlockFeatures, Record, States
from shards.stream.view import View
from shards.writer import CacheWriter
from stages.nets.student import Prediction
from stages.train.loop import Hooks
from stages.train.validation import (
    VALIDATION_BATCH_SIZE,
    RelativeError,
    Validation,
    ValidationConfig,
    ValidationResult,
    VelocityErrors,
)

SHAPE, SIZE = (3, 4, 5), PictureSize(40, 32)
UNCOND = torch.zeros(1, 6, 7)


def field(x: Tensor, s: Tensor, cond: Tensor) -> Tensor:
    """The teacher's velocity: any function of state, time and prompt will do."""
    return x * (1 + s.view(-1, 1, 1, 1)) + cond.float().mean(dim=(1, 2)).view(-1, 1, 1, 1)


class FormulaTeacher:
    """Predicts by the formula, and records its inputs."""

    uncond = UNCOND

    def __init__(self) -> None:
        self.inputs: list[Tensor] = []

    def predict(self, x: Tensor, s: Tensor, k: Tensor, cond: Tensor, uncond: Tensor) -> SimpleNamespace:
        self.inputs.append(x)
        return SimpleNamespace(v_cond=field(x, s, cond), v_uncond=field(x, s, uncond.expand_as(cond)))


class Exact(nn.Module):
    """A student that is its teacher."""

    def forward(self, x: Tensor, s: Tensor, cond: Tensor, uncond: Tensor) -> Prediction:
        return Prediction(field(x, s, cond), field(x, s, uncond.expand_as(cond)), {})


class Memorising(Exact):
    """A student with no error at the states it has seen, and half the velocity elsewhere."""

    def __init__(self, seen: list[Tensor]) -> None:
        super().__init__()
        self.seen = {row.numpy().tobytes() for row in seen}

    def forward(self, x: Tensor, s: Tensor, cond: Tensor, uncond: Tensor) -> Prediction:
        known = torch.tensor([1.0 if row.numpy().tobytes() in self.seen else 0.5 for row in x]).view(-1, 1, 1, 1)
        out = super().forward(x, s, cond, uncond)
        return Prediction(known * out.v_cond, known * out.v_uncond, {})


def record(number: int, renoised: int) -> Record:
    generator = torch.Generator().manual_seed(number)
    cond, x0 = torch.randn(6, 7, generator=generator).half(), torch.randn(SHAPE, generator=generator).half()
    s = torch.rand(3, generator=generator)
    x_s = torch.randn(3, *SHAPE, generator=generator).half()
    states = States(
        k=(s * 999).long(),
        s=s,
        x_s=x_s,
        v_cond=field(x_s.float(), s, cond.expand(3, 6, 7)).half(),
        v_uncond=field(x_s.float(), s, UNCOND.expand(3, 6, 7)).half(),
        trajectory=torch.arange(3) < 3 - renoised,
    )
    features = BlockFeatures({"mid": torch.zeros(3, 2).half()})
    return Record(f"{number:09d}", f"star {number}", "star/red", number, 3.0, cond, x0, states, features, SIZE)


def cache(folder: Path, renoised: int = 2) -> Path:
    writer = CacheWriter(folder, Recipe(identity={"teacher": "formula"}, information={}))
    writer.add("train", 0, [record(number, renoised) for number in range(20)])
    writer.add("validation", 0, [record(number, renoised) for number in range(100, 104)])
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return cache(tmp_path / "cache")


def validation(folder: Path, states: int = 20, teacher: FormulaTeacher | None = None, **view: object) -> Validation:
    seen = Reader(folder, "train", view=View.model_validate(view))
    return Validation(ValidationConfig(states=states), Reader(folder, "validation"), seen, teacher or FormulaTeacher())


def test_a_student_that_is_its_teacher_has_no_error_and_no_gap(folder):
    result = validation(folder)(Exact())
    assert result.score < 1e-6  # the cache rounds its outputs
    assert result.metrics()["cache_gap"] == pytest.approx(0, abs=1e-6)
    assert result.held_out.states == 12
    assert validation(folder).summary() == (
        "validation: 12 held-out states, 20 seen ones and their twins under new noise"
    )


def test_a_student_that_memorised_the_cache_has_a_gap(folder):
    seen = [row.float() for reader in [Reader(folder)] for one in reader.records() for row in one.states.x_s]
    metrics = validation(folder)(Memorising(seen)).metrics()
    assert metrics["seen"] < 1e-6
    assert metrics["seen_new_noise"] == pytest.approx(0.25, rel=1e-3)
    assert metrics["cache_gap"] == pytest.approx(0.25, rel=1e-3)
    assert metrics["held_out"] == pytest.approx(0.25, rel=1e-3)
    assert len(metrics["cache_gap_by_s"]) == len(metrics["held_out_by_s"]) == 5


def test_seen_states_are_renoised_pictures_of_the_view(folder):
    measured = validation(folder, s_range=(0.0, 0.5))
    rows = [
        (key, int(state))
        for _, batch in measured._seen
        for key, state in zip(batch.keys, batch.state_index, strict=True)
    ]
    assert len(rows) == len(set(rows)) > 0
    assert all(state > 0 for _, state in rows)
    assert all(bool((batch.s < 0.5).all()) for _, batch in measured._seen)


def test_renoised_states_differ_in_their_noise_alone_and_are_rounded_before_the_teachers_call(folder):
    teacher = FormulaTeacher()
    measured, again = validation(folder, 20, teacher), validation(folder)
    assert [len(batch) for batch in measured._renoised] == [VALIDATION_BATCH_SIZE, 4]
    for (x0, old), new, same, inputs in zip(
        measured._seen, measured._renoised, again._renoised, teacher.inputs, strict=True
    ):
        assert new.keys == old.keys
        assert torch.equal(new.s, old.s)
        assert not torch.equal(new.x_s, old.x_s)
        assert torch.equal(new.x_s, same.x_s)
        assert torch.equal(inputs, new.x_s.float())
        s = new.s.view(-1, 1, 1, 1)
        noise = (new.x_s.float() - (1 - s) * x0.float()) / s
        assert 0.8 < noise.std() < 1.2


def test_a_cache_without_renoised_states_has_held_out_ones_alone(tmp_path):
    measured = validation(cache(tmp_path / "plain", renoised=0))
    assert measured.summary() == (
        "validation: 12 held-out states, no seen ones: the cache holds no renoised state, so its gap is not measured"
    )
    result = measured(Exact())
    assert (result.seen, result.seen_new_noise) == (None, None)
    assert "cache_gap" not in result.metrics()
    assert result.score < 1e-6


def test_without_states_nothing_is_measured(folder):
    teacher = FormulaTeacher()
    assert validation(folder, 0, teacher)(Exact()) is None
    assert teacher.inputs == []


class Stub:
    """A validation with a fixed result, which records the weights of the student."""

    def __init__(self) -> None:
        self.shown: list[Tensor] = []

    def __call__(self, student: nn.Module) -> ValidationResult:
        assert not student.training
        self.shown.append(student.conv.weight.detach().clone())
        error = RelativeError(0.5, (0.5, None))
        return ValidationResult(VelocityErrors(error, error, 2), error, error, 0.1)


def test_training_is_measured_with_each_checkpoint_and_not_changed_by_it(tmp_path, train):
    shown, stub = [], Stub()
    look = Hooks(stub, on_checkpoint=lambda _samples, student: shown.append(student.conv.weight.detach().clone()))
    measured = train(tmp_path / "a", hooks=look)
    plain = train(tmp_path / "b")
    assert torch.equal(measured.conv.weight, plain.conv.weight)
    assert all(torch.equal(one, two) for one, two in zip(stub.shown, shown, strict=True))
    lines = [json.loads(line) for line in (tmp_path / "a" / "journal.jsonl").read_text().splitlines()]
    validated = [line for line in lines if line.get("kind") == "validation"]
    assert [line["samples"] for line in validated] == [8, 16, 24]
    assert validated[0]["cache_gap"] == 0
