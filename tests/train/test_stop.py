"""Early stopping: patience, the limit on losses, and the same decision in a resumed run."""

import json
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from shards.batch import Batch
from stages.classes.monitor import CheckpointScore, StopConfig, best_checkpoint, stop_reason
from stages.system.refusal import Refused
from stages.system.storage import lease
from stages.train.checkpoint_store import CheckpointMeta
from stages.train.journal import read_events
from stages.train.loop import Hooks

PATIENT = StopConfig(patience=2, most_lost=5)


def marks(*scores: float, lost: float = 0.0) -> list[CheckpointScore]:
    return [CheckpointScore(8 * (i + 1), score, {"stars": lost}) for i, score in enumerate(scores)]


def test_training_goes_on_while_the_score_gets_better():
    assert all(stop_reason(marks(0.5, 0.4, 0.6, 0.3, 0.35)[:count], PATIENT) is None for count in range(6))


def test_training_ends_after_so_many_checkpoints_without_a_better_score():
    assert stop_reason(marks(0.5, 0.3, 0.4), PATIENT) is None
    assert "no better score in 2 checkpoints than 0.3000 after 16 samples" in (
        stop_reason(marks(0.5, 0.3, 0.4, 0.3), PATIENT) or ""
    )
    assert best_checkpoint(marks(0.5, 0.3, 0.4, 0.3), PATIENT).samples == 16


def test_training_ends_when_a_class_or_the_rest_loses_too_much():
    scores = [*marks(0.5, 0.4), CheckpointScore(24, 0.1, {"stars": -9.0, "(outside)": 5.1})]
    assert stop_reason(scores, PATIENT) == "ended, (outside) has lost 5.1 points"
    assert best_checkpoint(scores, PATIENT).samples == 16
    assert stop_reason(scores, StopConfig(patience=2, most_lost=None)) is None
    assert best_checkpoint(scores, StopConfig(patience=2, most_lost=None)).samples == 24


def test_when_every_checkpoint_loses_too_much_there_is_no_best_one():
    with pytest.raises(Refused, match=r"after 8 samples stars has lost 7\.0 points.*learning_rate"):
        best_checkpoint(marks(0.5, lost=7.0), PATIENT)


SCORES = {8: 0.5, 16: 0.2, 24: 0.4, 32: 0.3, 40: 0.1}


@dataclass
class CheckpointHooks:
    """Scores from SCORES at each checkpoint, and a stop reason from the journal."""

    folder: object
    samples: int = 0

    def hooks(self) -> Hooks:
        return Hooks(validate=self, stop_reason=self.stop_reason)

    def __call__(self, _student) -> "CheckpointHooks":
        written = sorted(self.folder.glob("checkpoints/0*"))
        self.samples = int(written[-1].name) + 8 if written else 8
        return self

    @property
    def kind(self) -> str:
        return "classes"

    @property
    def score(self) -> float:
        return SCORES[self.samples]

    def metrics(self) -> dict:
        return {"wrong": self.score, "lost": {}}

    def stop_reason(self, samples: int) -> str | None:
        return stop_reason(
            [CheckpointScore.from_event(event) for event in read_events(self.folder, "classes", samples)], PATIENT
        )


CHANGES = {"max_samples": 40, "keep": {"last": 1}}


@pytest.mark.parametrize("cut", [10, 26, 30])
def test_an_interrupted_run_ends_at_the_same_checkpoint_as_one_that_was_not(tmp_path, train, power_cut, capsys, cut):
    whole = train(tmp_path / "whole", CHANGES, hooks=CheckpointHooks(tmp_path / "whole").hooks())
    assert "ended, no better score in 2 checkpoints than 0.2000 after 16 samples" in capsys.readouterr().out
    with pytest.raises(InterruptedError):
        train(tmp_path / "cut", CHANGES, hooks=CheckpointHooks(tmp_path / "cut").hooks(), batches=power_cut(cut))
    resumed = train(tmp_path / "cut", CHANGES, hooks=CheckpointHooks(tmp_path / "cut").hooks())
    kept = [path.name for path in sorted((tmp_path / "whole" / "checkpoints").glob("0*"))]
    assert kept == ["000000016", "000000032"]
    assert [path.name for path in sorted((tmp_path / "cut" / "checkpoints").glob("0*"))] == kept
    pairs = zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)
    for name in kept:
        one, two = (CheckpointMeta.read(tmp_path / run / "checkpoints" / name) for run in ("whole", "cut"))
        assert (one.files, one.score) == (two.files, two.score)


def test_a_run_that_was_killed_before_it_ended_ends_when_it_goes_on(tmp_path, train, capsys):
    """Its last checkpoint and the journal exist, and nothing else records that training has ended."""
    train(tmp_path, CHANGES, hooks=CheckpointHooks(tmp_path).hooks())
    weights = (tmp_path / "checkpoints" / "000000032" / "ema.safetensors").read_bytes()
    capsys.readouterr()
    train(tmp_path, CHANGES, hooks=CheckpointHooks(tmp_path).hooks())
    assert "ended, no better score in 2 checkpoints" in capsys.readouterr().out
    assert (tmp_path / "checkpoints" / "000000032" / "ema.safetensors").read_bytes() == weights


def test_events_are_complete_lines_of_one_kind_up_to_a_number_of_samples(tmp_path):
    lines = [
        {"samples": 8, "loss": 1.0},
        {"samples": 8, "kind": "classes", "wrong": 0.5},
        {"samples": 16, "kind": "validation", "held_out": 0.1},
        {"samples": 24, "kind": "classes", "wrong": 0.4},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"samples": 8, "kind": "cla'
    (tmp_path / "journal.jsonl").write_text(text)
    assert [event["samples"] for event in read_events(tmp_path, "classes", 24)] == [8, 24]
    assert [event["samples"] for event in read_events(tmp_path, "classes", 16)] == [8]
    assert read_events(tmp_path / "nowhere", "classes", 24) == []


def test_a_run_that_another_machine_took_over_ends_without_another_checkpoint(tmp_path, train, power_cut, monkeypatch):
    taken = "s3://b/run: elsewhere works here by now - start again when the other one is done"
    monkeypatch.setattr(lease, "_losses", {})

    def batches(first: int) -> Iterator[Batch]:
        for batch in power_cut(20)(first):
            if batch.keys[0] == "000000010":
                lease._losses[tmp_path / ".claim"] = taken
            yield batch

    with pytest.raises(Refused, match=taken):
        train(tmp_path, CHANGES, batches=batches)
    assert [path.name for path in sorted((tmp_path / "checkpoints").glob("0*"))] == ["000000008"]
