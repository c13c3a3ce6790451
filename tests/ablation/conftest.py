"""A study on the golden cache, whose teacher has eight channels: a run takes seconds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

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
