"""A plan counts the passes that a conversion takes, and makes nothing."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel

from stages import __main__ as program
from stages.cache.targets import StatesConfig, make_records
from stages.convert import plan
from stages.convert.plan import BRANCHES, paired_passes, remaining_samples
from stages.convert.starts import Models, make_start, probe_starts
from stages.convert.verdict import measure_verdict
from stages.nets.components import load_components
from stages.nets.run_folder import open_run
from stages.nets.teacher import Teacher
from stages.prompts import Prompt
from stages.sampling.sampler import Sampler
from tests.convert.runs import GOLDEN, SMALL


@contextmanager
def counted_passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The rows of each call of any UNet in this block."""
    rows: list[int] = []
    forward = UNet2DConditionModel.forward

    def count(unet: UNet2DConditionModel, sample: torch.Tensor, *args: object, **kwargs: object) -> object:
        rows.append(len(sample))
        return forward(unet, sample, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(UNet2DConditionModel, "forward", count)
        yield rows


@pytest.fixture(scope="module")
def models() -> Models:
    parts = load_components(str(GOLDEN / "teacher"), torch.device("cpu"), torch.float32)
    return Models(open_run(GOLDEN / "distill"), parts, Teacher(replace(parts), "hold"))


def test_probe_and_verdict_take_the_passes_that_are_counted(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    texts, sampler = ["a purple heart", "a red star"], Sampler(steps=3, guidance=3.0)
    with counted_passes(monkeypatch) as rows:
        probe_starts(models, texts, 0, sampler)
    assert sum(rows) == paired_passes(2, [3], students=3)
    with counted_passes(monkeypatch) as rows:
        measure_verdict(models, make_start("graft", models).eval(), texts, 0, sampler, None, (1, 2))
    assert sum(rows) == paired_passes(2, [1, 2], students=4)


def test_a_prompt_of_the_cache_takes_its_steps_and_its_renoised_states(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = StatesConfig(steps=5, trajectory_states=2, renoised_states=3)
    with counted_passes(monkeypatch) as rows:
        make_records(models.teacher, [Prompt("a red star", "shape/star", 1)], ["000000000"], states)
    assert sum(rows) == BRANCHES * (states.steps + states.renoised_states)


def test_a_plan_prints_the_cost_of_each_part_and_makes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["convert", str(GOLDEN / "teacher"), "--base", str(GOLDEN), "--out", str(out), *SMALL, "--plan"]
    assert program.main(words) == 0
    assert list(tmp_path.iterdir()) == []
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    passes = {name: int(lines[name].split()[1].replace(",", "")) for name in ("probe", "cache", "polish", "verdict")}
    assert passes["probe"] == paired_passes(2, [2], students=3)
    assert passes["cache"] == 8 * BRANCHES * (4 + 3)
    assert passes["polish"] > 20 * BRANCHES * 3
    assert passes["verdict"] == paired_passes(2, [1, 2], students=4)
    assert {"time", "counted", "disk", "free"} <= lines.keys()


def test_a_plan_counts_what_is_left_of_the_polish(tmp_path: Path) -> None:
    left = SimpleNamespace(folder=tmp_path, config=SimpleNamespace(train=SimpleNamespace(max_samples=20)))
    counted = [remaining_samples(left)]  # type: ignore[arg-type]
    for samples in (8, 16, 24):
        checkpoint = tmp_path / "checkpoints" / f"{samples:09d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "ema.safetensors").touch()
        counted.append(remaining_samples(left))  # type: ignore[arg-type]
    assert counted == [20, 12, 4, 0]


def test_a_step_that_may_not_fit_the_memory_is_counted_and_not_tried(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "available_bytes", lambda: 1 << 20)
    monkeypatch.setattr(plan, "measure_step", lambda *_: pytest.fail("a step was tried"))
    words = ["convert", str(GOLDEN / "teacher"), "--base", str(GOLDEN), "--out", str(tmp_path / "out"), *SMALL]
    assert program.main([*words, "--plan"]) == 0
    polish = [line for line in capsys.readouterr().out.splitlines() if line.startswith("polish")]
    assert len(polish) == 2
    assert "counted, not measured" in polish[1]
    assert int(polish[0].split()[1].replace(",", "")) > 20 * BRANCHES * 3
