"""A run that trains adapters: the content of its checkpoints, and a bitwise resume."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stages.nets.lora import LoraConfig, adapter_parameters, add_adapters
from stages.nets.student import Student
from stages.tiny.anatomy import build_unet
from stages.train.objective import Objective, ObjectiveConfig

ADAPTERS = LoraConfig(rank=2)


@pytest.fixture
def train_adapters(train: Callable[..., Any], unet_batches: Callable[..., Any]) -> Callable[..., Student]:
    """Train adapters of a tiny UNet for six samples, or until it is interrupted."""

    def run(folder: Path, interrupted_at: int | None = None) -> Student:
        torch.manual_seed(0)
        return train(
            folder,
            {"max_samples": 6, "checkpoint_every_samples": 2},
            student=add_adapters(Student(build_unet()), ADAPTERS),
            objective=Objective(ObjectiveConfig(), ()),
            batches=unet_batches(interrupted_at),
            uncond=torch.zeros(1, 3, 64),
        )

    return run


def test_a_resumed_run_of_adapters_has_the_very_bits_of_an_uninterrupted_one(tmp_path, train_adapters) -> None:
    whole = train_adapters(tmp_path / "whole").state_dict()
    with pytest.raises(InterruptedError):
        train_adapters(tmp_path / "cut", interrupted_at=4)
    resumed = train_adapters(tmp_path / "cut").state_dict()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    states = [json.loads((tmp_path / run / "checkpoints/000000006/state.json").read_text()) for run in ("whole", "cut")]
    assert states[0]["files"] == states[1]["files"]


def test_the_weights_stay_and_only_adapters_are_trained_averaged_and_kept(tmp_path, train_adapters) -> None:
    torch.manual_seed(0)
    fresh = add_adapters(Student(build_unet()), ADAPTERS)
    trained = train_adapters(tmp_path)
    own, before = dict(trained.named_parameters()), dict(fresh.named_parameters())
    moved = {name for name, value in before.items() if not torch.equal(value, own[name])}
    assert moved == adapter_parameters(fresh).keys()
    for file in ("student.safetensors", "ema.safetensors"):
        assert load_file(tmp_path / "checkpoints/000000006" / file).keys() == adapter_parameters(fresh).keys()
    journal = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    ratios = next(line["update_ratio"] for line in reversed(journal) if line.get("update_ratio"))
    assert "mid" in ratios
    assert "down_3" not in ratios  # it has no attention
