import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from stages.nets.student import Student
from stages.system.refusal import Refused
from stages.tiny.anatomy import build_unet
from stages.train.block_weighter import BlockWeighter
from stages.train.checkpoint_store import CheckpointMeta, fault_of
from stages.train.journal import read_step_lines
from stages.train.loop import Hooks
from stages.train.objective import Objective, ObjectiveConfig
from stages.train.step import sample_time_jitter
from stages.train.validation import RelativeError, ValidationResult, VelocityErrors


def files(folder: Path, samples: int) -> dict[str, str]:
    """The hashes of a checkpoint: weights, average, optimizer."""
    content = json.loads((folder / "checkpoints" / f"{samples:09d}" / "state.json").read_text())
    return content["files"]


def same(one: nn.Module, two: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("cut", [10, 14, 20])
def test_a_run_cut_anywhere_resumes_to_the_same_bits_as_an_uninterrupted_one(tmp_path, train, power_cut, cut):
    whole = train(tmp_path / "whole")
    with pytest.raises(InterruptedError):
        train(tmp_path / "cut", batches=power_cut(cut))
    resumed = train(tmp_path / "cut")
    assert same(resumed, whole)
    assert files(tmp_path / "cut", 24) == files(tmp_path / "whole", 24)
    assert files(tmp_path / "whole", 16) != files(tmp_path / "whole", 24)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_resumed_unet_has_the_same_bits_as_an_uninterrupted_one(tmp_path, train, unet_batches, kind):
    def run(folder: Path, **options):
        torch.manual_seed(0)
        student = Student(build_unet())
        options = {"batches": unet_batches(None), "uncond": torch.zeros(1, 3, 64), **options}
        objective = Objective(ObjectiveConfig(), ())
        knobs = {"max_samples": 6, "checkpoint_every_samples": 2, "optimizer": {"kind": kind}}
        return train(folder, knobs, student=student, objective=objective, **options)

    whole = run(tmp_path / "whole")
    with pytest.raises(InterruptedError):
        run(tmp_path / "cut", batches=unet_batches(4))
    assert same(run(tmp_path / "cut"), whole)
    assert files(tmp_path / "cut", 6) == files(tmp_path / "whole", 6)


def test_the_journal_of_a_resumed_run_has_each_sample_once(tmp_path, train, power_cut):
    with pytest.raises(InterruptedError):
        train(tmp_path, batches=power_cut(14))
    train(tmp_path)
    samples = [json.loads(line)["samples"] for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    assert samples == [4, 8, 12, 16, 20, 24]


def test_a_resumed_run_prints_where_it_continues(tmp_path, train, power_cut, capsys):
    with pytest.raises(InterruptedError):
        train(tmp_path, batches=power_cut(14))
    train(tmp_path, samples_per_epoch=16)
    output = capsys.readouterr().out
    assert "000000008: going on after 8 of 24 samples, epoch 0.50, learning rate" in output
    assert "next 000000008" in output


def test_a_finished_run_has_nothing_left_to_do(tmp_path, train, capsys):
    whole = train(tmp_path)
    again = train(tmp_path, batches=lambda first: pytest.fail("data was requested"))
    assert same(again, whole)
    assert "all 24 samples seen already" in capsys.readouterr().out


def test_the_returned_student_has_its_averaged_weights(tmp_path, train):
    shown = {}
    averaged = train(
        tmp_path,
        hooks=Hooks(on_checkpoint=lambda samples, student: shown.update({samples: student.conv.weight.clone()})),
    )
    assert sorted(shown) == [8, 16, 24]
    assert torch.equal(shown[24], averaged.conv.weight)
    assert not averaged.training


def test_a_checkpoint_does_not_change_the_student(tmp_path, train):
    assert same(train(tmp_path / "a", {"checkpoint_every_samples": 2}), train(tmp_path / "b"))


def test_training_lowers_the_loss(tmp_path, train):
    train(tmp_path, {"max_samples": 400, "journal_every_samples": 100, "checkpoint_every_samples": 400})
    losses = [json.loads(line)["flow"] for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.95 * losses[0]


def test_losses_that_are_not_finite_stop_the_run_and_name_the_sample(tmp_path, train, batches_with_nan):
    with pytest.raises(Refused, match=r"not finite 1 times in a row, up to sample 14, last at 000000013 - "):
        train(tmp_path, {"max_skips": 1}, batches=batches_with_nan)
    assert fault_of(tmp_path / "checkpoints" / "000000008") is None
    assert not (tmp_path / "checkpoints" / "000000016").exists()


def test_another_configuration_is_refused_but_other_intervals_are_not(tmp_path, train, power_cut):
    with pytest.raises(InterruptedError):
        train(tmp_path, batches=power_cut(14))
    with pytest.raises(Refused, match=r"train\.optimizer\.clip_norm was 1\.0, is 2\.0"):
        train(tmp_path, {"optimizer": {"learning_rate": 0.01, "warmup_samples": 4, "clip_norm": 2.0}})
    with pytest.raises(Refused, match=r"train\.max_samples was 24, is 30: the learning rate's cosine would change"):
        train(tmp_path, {"max_samples": 30})
    with pytest.raises(Refused, match=r"recipe\.teacher was abc, is xyz"):
        train(tmp_path, identity={"recipe": {"teacher": "xyz"}})
    train(tmp_path, {"keep": {"last": 1}, "checkpoint_every_samples": 6, "journal_every_samples": 2})


class RecordingWeights(BlockWeighter):
    """Fixed lambdas and sample weights, with a count of the steps in its state."""

    def __init__(self, fixed_lambdas: list[float] | None = None, weight: float = 1.0) -> None:
        self.fixed_lambdas, self.weight, self.call_count = fixed_lambdas, weight, 0

    def lambdas(self):
        return torch.tensor(self.fixed_lambdas or [1.0, 0.0]) + (self.call_count / 1000 if self.fixed_lambdas else 0)

    def observe(self, batch, output, importance_weight):
        assert output.features["mid"].shape == (2, 3)
        assert importance_weight.tolist() == [self.weight] * len(batch)
        return (torch.ones(()),)

    def update(self, observations, samples):
        assert samples == 2
        self.call_count += int(observations[0])

    def importance_weight(self, batch):
        return torch.full_like(batch.s, self.weight)

    def metrics(self):
        return {"calls": self.call_count}

    def state_dict(self):
        return {"calls": self.call_count}

    def load_state_dict(self, state):
        self.call_count = state["calls"]


def test_a_block_weighter_is_called_at_every_batch_and_reaches_the_journal(tmp_path, train):
    weighter = RecordingWeights([2.0, 0.5])
    train(tmp_path, block_weighter=weighter)
    assert weighter.call_count == 12
    first = json.loads((tmp_path / "journal.jsonl").read_text().splitlines()[0])
    assert first["lambdas"] == pytest.approx({"mid": 2.0005, "up_3": 0.5005})
    assert first["calls"] == 2


def test_a_block_weighter_resumes_from_its_state(tmp_path, train, power_cut):
    with pytest.raises(InterruptedError):
        train(tmp_path / "cut", batches=power_cut(14), block_weighter=RecordingWeights([2.0, 0.5]))
    resumed = RecordingWeights([2.0, 0.5])
    assert same(
        train(tmp_path / "cut", block_weighter=resumed),
        train(tmp_path / "whole", block_weighter=RecordingWeights([2.0, 0.5])),
    )
    assert resumed.call_count == 12


def test_a_sample_with_weight_zero_changes_nothing(tmp_path, train, toy):
    settings = {"optimizer": {"weight_decay": 0.0}}
    assert same(train(tmp_path / "still", settings, block_weighter=RecordingWeights(weight=0.0)), toy)
    assert not same(train(tmp_path / "moved", settings), toy)


def test_data_that_ends_too_early_is_refused(tmp_path, train, batch):
    with pytest.raises(Refused, match="ended after 2 samples of 24"):
        train(tmp_path, batches=lambda first: iter([batch]))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_run_with_a_checkpoint_from_which_it_goes_on(tmp_path, train, capsys, number):
    def send_signal(samples: int, student: nn.Module) -> None:
        if samples == 8:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as left:
        train(tmp_path / "left", hooks=Hooks(on_checkpoint=send_signal))
    assert left.value.code == 128 + number
    assert signal.getsignal(number) is before
    assert "left after 10 samples, with a checkpoint" in capsys.readouterr().out
    assert same(train(tmp_path / "left"), train(tmp_path / "whole"))


def test_the_time_jitter_stays_within_half_a_step_of_a_sampler():
    apart = 1000 * sample_time_jitter(200, 0.5, torch.Generator().manual_seed(0))
    assert 0.4 < apart.abs().max() <= 0.5001
    assert apart.mean().abs() < 0.1


def test_micro_batches_make_the_step_of_their_batch(tmp_path, train):
    whole, parts = train(tmp_path / "whole"), train(tmp_path / "parts", {"accumulate": 2})
    for one, two in zip(whole.state_dict().values(), parts.state_dict().values(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)


def test_under_nohup_a_closed_terminal_is_no_reason_to_end(tmp_path, train):
    def closed(samples: int, student: nn.Module) -> None:
        os.kill(os.getpid(), signal.SIGHUP)

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert same(train(tmp_path / "left", hooks=Hooks(on_checkpoint=closed)), train(tmp_path / "whole"))
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_checkpoint_is_written_even_if_printing_fails(tmp_path, train, monkeypatch):
    """The reader of standard output dies with the terminal: the first line that is printed fails."""

    def closed(samples: int, student: nn.Module) -> None:
        if samples == 8:
            os.kill(os.getpid(), signal.SIGHUP)

            def broken(*_: object, **__: object) -> None:
                raise BrokenPipeError

            monkeypatch.setattr("stages.train.live.LogDisplay.show_line", broken)

    with pytest.raises(BrokenPipeError):
        train(tmp_path / "left", hooks=Hooks(on_checkpoint=closed))
    monkeypatch.undo()
    assert (tmp_path / "left" / "checkpoints" / "000000010").is_dir()
    assert same(train(tmp_path / "left"), train(tmp_path / "whole"))


def test_the_settings_are_saved_once_nothing_can_be_refused(tmp_path, train):
    begun = []
    hooks = Hooks(on_start=lambda: begun.append(1))
    train(tmp_path, hooks=hooks)
    assert begun == [1]
    for changes in ({"optimizer": {"learning_rate": 0.5}}, {"max_samples": 26}, {"accumulate": 3}):
        with pytest.raises(Refused):
            train(tmp_path, changes, hooks=hooks)
    assert begun == [1]
    train(tmp_path, hooks=hooks)  # nothing is left to be done, and its settings may have changed
    assert begun == [1, 1]


def test_a_remote_checkpoint_of_another_run_leaves_nothing(tmp_path, train):
    train(tmp_path / "there")

    def bring(folder: Path) -> Path:
        return Path(shutil.copytree(tmp_path / "there" / "checkpoints" / "000000024", folder / "000000024"))

    with pytest.raises(Refused, match=r"learning_rate was 0\.01, is 0\.5"):
        train(tmp_path / "here", {"optimizer": {"learning_rate": 0.5}}, hooks=Hooks(fetch_checkpoint=bring))
    assert not (tmp_path / "here").exists()


def test_after_a_last_batch_beyond_the_last_sample_no_time_remains(tmp_path, train, capsys):
    train(tmp_path, {"max_samples": 23})
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("train samples=")]
    assert "samples=24 of=24" in lines[-1]
    assert all("left=0:" in line for line in lines)


def test_a_batch_that_does_not_divide_is_refused(tmp_path, train):
    with pytest.raises(
        Refused, match=r"train\.batch_size = 2: .* 1 processes x train\.accumulate = 3 .* multiple of 3"
    ):
        train(tmp_path, {"accumulate": 3})


def test_a_resume_with_other_micro_batches_is_reported(tmp_path, train, power_cut, capsys):
    with pytest.raises(InterruptedError):
        train(tmp_path, batches=power_cut(14))
    train(tmp_path, {"accumulate": 2})
    assert "equal to rounding, not to the last bit: accumulate was 1, is 2" in capsys.readouterr().out


def test_hooks_are_called_at_each_checkpoint_and_at_each_line(tmp_path, train, capsys):
    kept: list[Path] = []

    def validate(student) -> ValidationResult:
        error = RelativeError(0.25 / (1 + len(kept)), (None,))
        return ValidationResult(VelocityErrors(error, error, 1), None, None, 0.0)

    hooks = Hooks(
        validate=validate,
        on_checkpoint_saved=kept.append,
        extra_metrics=lambda: {"uploads": len(kept)},
        warning=lambda: "no connection" if kept else None,
    )
    train(tmp_path, {"checkpoint_every_samples": 12}, hooks=hooks)
    assert [folder.name for folder in kept] == ["000000012", "000000024"]
    assert [CheckpointMeta.read(folder).score for folder in kept] == [0.25, 0.125]
    assert [line["uploads"] for line in read_step_lines(tmp_path)] == [0, 0, 0, 1, 1, 1]
    assert capsys.readouterr().out.count("no connection") == 3


def test_a_remote_checkpoint_is_fetched_when_none_is_local(tmp_path, train, power_cut):
    with pytest.raises(InterruptedError):
        train(tmp_path / "there", batches=power_cut(14))

    def bring(folder: Path) -> Path:
        return Path(shutil.copytree(tmp_path / "there" / "checkpoints" / "000000008", folder / "000000008"))

    brought = train(tmp_path / "here", hooks=Hooks(fetch_checkpoint=bring))
    assert same(brought, train(tmp_path / "whole"))
    assert not (tmp_path / "here" / "checkpoints" / "000000000").exists()
