"""A study on the golden cache, whose teacher has eight channels: a run takes seconds."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from stages.ablation import command, scheduler
from stages.ablation.jobs import Job
from stages.ablation.worker import run_job

GOLDEN = Path("tests/golden/data")


@pytest.fixture
def write_study(tmp_path: Path) -> Callable[..., Path]:
    """Write a small study, with other entries if any; `...` takes one out. Returns its file."""

    def write(name: str = "small", **changes: Any) -> Path:
        content: dict[str, Any] = {
            "title": "Is it so?",
            "files": [str(settings)],
            "options": {
                "david": {"fusion": {"formula": "static"}},  # fits none
                "train": {
                    "batch_size": 4,
                    "checkpoint_every_samples": 4,
                    "tracking": {"to": []},
                    "optimizer": {"warmup_samples": 0},
                },
            },
            "evaluate": {"velocity_states": 6, "paired": {"prompts": 2, "steps": [1, 2], "reference_steps": 2}},
            "samples": 8,
            "seeds": 2,
            "metrics": ["paired error at 2 steps", "velocity error"],
            "arms": {
                "A": {"title": "velocity alone", "options": {"objective": {"block_weight": 0.0}}},
                "B": {"title": "blocks", "options": {"david": {"fusion": {"formula": "uniform"}}}},
            },
            "comparisons": [{"arms": ["B"], "against": ["A"]}],
            **changes,
        }
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not ...}))
        return file

    prompts = {"source": "grammar", "grammar": "stages/tiny/grammar.yaml"}
    settings = tmp_path / "settings.yaml"
    validation = {"states": 4}
    grid = {"prompts": ["a star"], "sampler": {"steps": 1}}
    teacher = str(GOLDEN / "teacher")
    settings.write_text(
        yaml.safe_dump(
            {
                "cache_teacher": {"teacher": teacher, "prompts": prompts, "count": 8, "validation_count": 2},
                "distill": {"validation": validation, "grid": grid},
                "evaluate": {"prompts": prompts},
            }
        )
    )
    return write


def in_this_process(
    jobs: Sequence[Job], cache_run: Path, _at_once: int, on_finished: Callable[[Job], None], _start: object
) -> None:
    """The scheduler without processes."""
    for job in jobs:
        scheduler.prepare(job, cache_run)
        run_job(job)
        on_finished(job)


@pytest.fixture
def ablate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Path]:
    """Run the command on the golden cache in this process; returns the folder of the runs."""
    monkeypatch.setattr(scheduler, "run_jobs", in_this_process)

    def run(*words: str) -> Path:
        out = tmp_path / "out"
        assert command.main([*words, "--run", str(GOLDEN), "--out", str(out), "--device", "cpu"]) == 0
        return out

    return run
