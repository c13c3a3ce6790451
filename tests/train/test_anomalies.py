"""Skipped steps and loss spikes: their counts, and the lines written about them."""

import json
from pathlib import Path

import torch

from stages.train.objective import Objective, ObjectiveConfig
from stages.train.runtime import Runtime
from stages.train.state import MIN_STEPS, Anomalies


def after_usual_losses(path: Path | None = None) -> Anomalies:
    """The record after losses around 1, a tenth up and down."""
    anomalies = Anomalies(path, spike_sigmas=6.0)
    for number in range(2 * MIN_STEPS):
        assert anomalies.add_loss(1.1 if number % 2 else 0.9) is None
    return anomalies


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "mishaps.jsonl").read_text().splitlines()]


def test_a_loss_far_above_the_others_is_a_spike_and_one_far_below_is_none() -> None:
    anomalies = after_usual_losses()
    usual = anomalies.add_loss(3.0)
    assert usual is not None
    assert 0.9 < usual < 1.1
    assert anomalies.add_loss(0.1) is None
    assert anomalies.spikes == 1


def test_a_spike_does_not_hide_the_next_but_a_lasting_rise_becomes_the_new_mean() -> None:
    anomalies = after_usual_losses()
    assert [anomalies.add_loss(loss) is not None for loss in (30.0, 1.0, 30.0)] == [True, False, True]
    is_spike = [anomalies.add_loss(3.0) is not None for _ in range(4 * MIN_STEPS)]
    assert not any(is_spike[MIN_STEPS:])


def test_nothing_is_a_spike_before_enough_was_seen() -> None:
    anomalies = Anomalies(spike_sigmas=0.1)
    assert not any(anomalies.add_loss(10.0**number) for number in range(MIN_STEPS))


def test_they_resume_from_their_state() -> None:
    original, restored = after_usual_losses(), Anomalies(spike_sigmas=6.0)
    original.count_skip(is_consecutive=True)
    restored.load_state_dict(original.state_dict())
    assert (restored.skipped, restored.consecutive_skips) == (1, 1)
    assert restored.add_loss(3.0) == original.add_loss(3.0) is not None


def test_a_step_that_is_not_finite_is_skipped_recorded_and_dropped_with_its_checkpoints(
    tmp_path, train, batches_with_nan, power_cut
):
    train(tmp_path, batches=batches_with_nan)
    assert lines(tmp_path) == [{"samples": 14, "kind": "non_finite", "keys": ["000000013"], "in_a_row": 1}]
    last = json.loads((tmp_path / "journal.jsonl").read_text().splitlines()[-1])
    assert (last["samples"], last["skipped"]) == (24, 1)
    for folder in (tmp_path / "checkpoints").glob("0000000[12]*"):
        (folder / "state.json").unlink()
    train(tmp_path)
    assert lines(tmp_path) == []


def test_halving_the_scale_of_fp16_is_no_consecutive_skip_above_the_minimum(tmp_path, train):
    runtime = Runtime(torch.device("cpu"))
    runtime.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    objective = Objective(ObjectiveConfig(block_weight=0, guidance_weight=100), ())
    train(tmp_path, {"max_skips": 1}, runtime=runtime, objective=objective)
    assert {line["in_a_row"] for line in lines(tmp_path)} == {0}
    memory = torch.load(tmp_path / "checkpoints" / "000000024" / "memory.pt", weights_only=True)
    assert memory["scaler"]["scale"] == runtime.scaler.get_scale() < 2.0**127
    runtime.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    runtime.scaler.scale(torch.ones(()))
    assert not runtime.reduce_loss_scale()
