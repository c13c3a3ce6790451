import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from configs.refusal import Refused
from stages.train.checkpoint import Checkpoints, differences, fault_of
from stages.train.ema import Ema
from stages.train.optim import OptimizerConfig, build_optimizer
from stages.train.state import TrainingState


@pytest.fixture
def state(toy) -> TrainingState:
    state = TrainingState(toy, Ema(toy), build_optimizer(OptimizerConfig(), dict(toy.named_parameters())))
    toy.conv.weight.sum().backward()
    state.optimizer.step()
    return state


def save(folder, state, *samples: int, keep: int = 2) -> Checkpoints:
    checkpoints = Checkpoints(folder, {"recipe": "r"}, keep)
    for n in samples:
        state.samples = n
        checkpoints.save(state)
    return checkpoints


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_brings_back_every_bit(tmp_path, state):
    checkpoints = save(tmp_path, state, 8)
    then = {name: value.clone() for name, value in state.student.state_dict().items()}
    average = {name: value.clone() for name, value in state.ema.tensors().items()}
    moment = state.optimizer.state[state.student.conv.weight]["exp_avg"].clone()
    for parameter in state.student.parameters():
        parameter.data.zero_()
    state.ema.update(0.0)
    state.optimizer.state[state.student.conv.weight]["exp_avg"].zero_()
    state.samples = 0
    assert checkpoints.restore(state, "auto") == tmp_path / "000000008"
    assert state.samples == 8
    assert all(torch.equal(value, then[name]) for name, value in state.student.state_dict().items())
    assert all(torch.equal(value, average[name]) for name, value in state.ema.tensors().items())
    assert torch.equal(state.optimizer.state[state.student.conv.weight]["exp_avg"], moment)


def test_only_the_newest_are_kept(tmp_path, state):
    save(tmp_path, state, 8, 16, 24)
    assert names(tmp_path) == ["000000016", "000000024"]


def test_a_half_written_checkpoint_is_passed_over_and_removed(tmp_path, state, capsys):
    checkpoints = save(tmp_path, state, 8)
    shutil.copytree(tmp_path / "000000008", tmp_path / ".000000016.partial")
    (tmp_path / ".000000016.partial" / "state.json").unlink()
    assert checkpoints.restore(state, "auto") == tmp_path / "000000008"
    assert names(tmp_path) == ["000000008"]
    assert "half-written" in capsys.readouterr().out


@pytest.mark.parametrize("file", ["student.safetensors", "ema.safetensors", "optimizer.pt"])
def test_a_corrupted_checkpoint_is_passed_over_with_its_reason(tmp_path, state, capsys, file):
    checkpoints = save(tmp_path, state, 8, 16)
    path = tmp_path / "000000016" / file
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert checkpoints.restore(state, "auto") == tmp_path / "000000008"
    assert f"000000016: passed over, {file} is not the file that was written" in capsys.readouterr().out


def test_every_fault_of_a_folder_has_a_name(tmp_path, state):
    save(tmp_path, state, 8)
    folder = tmp_path / "000000008"
    assert fault_of(folder) is None
    assert "16 samples" not in (fault_of(folder.rename(tmp_path / "000000016")) or "")
    folder = tmp_path / "000000016"
    assert fault_of(folder) == "state.json speaks of 8 samples"
    (folder / "state.json").write_text("{")
    assert fault_of(folder) == "state.json cannot be read"
    (folder / "state.json").unlink()
    assert fault_of(folder) == "state.json is missing, so it was never finished"


def test_a_broken_checkpoint_is_replaced_when_the_run_gets_there_again(tmp_path, state):
    checkpoints = save(tmp_path, state, 8)
    (tmp_path / "000000008" / "ema.safetensors").unlink()
    checkpoints.save(state)
    assert fault_of(tmp_path / "000000008") is None


def test_a_run_of_another_recipe_is_refused_with_what_differs(tmp_path, state):
    save(tmp_path, state, 8)
    with pytest.raises(Refused, match="recipe was r, is another"):
        Checkpoints(tmp_path, {"recipe": "another"}, 2).restore(state, "auto")


def test_longer_training_is_refused_because_of_its_cosine():
    (line,) = differences({"train": {"max_samples": 8, "seed": 0}}, {"train": {"max_samples": 9, "seed": 0}})
    assert line == "train.max_samples was 8, is 9: the learning rate's cosine would change"


def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path, state):
    checkpoints = save(tmp_path, state, 8)
    with pytest.raises(Refused, match="holds a run already"):
        checkpoints.restore(state, "never")


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path, state, monkeypatch):
    checkpoints = save(tmp_path, state, 8)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=1000))
    state.samples = 16
    with pytest.raises(Refused, match=r"0\.0 MiB free, a checkpoint takes 1\.0 MiB"):
        checkpoints.save(state)
    assert names(tmp_path) == ["000000008"]


def test_a_disk_that_fills_up_while_writing_leaves_nothing_half_written(tmp_path, state, monkeypatch):
    checkpoints = save(tmp_path, state, 8)

    def full(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    state.samples = 16
    with pytest.raises(Refused, match="No space left on device"):
        checkpoints.save(state)
    assert names(tmp_path) == ["000000008"]
    assert fault_of(tmp_path / "000000008") is None


def test_the_last_good_one_stays_when_the_new_one_reads_back_wrongly(tmp_path, state, monkeypatch):
    checkpoints = save(tmp_path, state, 8, keep=1)
    monkeypatch.setattr("stages.train.checkpoint.fault_of", lambda _folder: "it rotted")
    state.samples = 16
    with pytest.raises(Refused, match="it rotted"):
        checkpoints.save(state)
    assert fault_of(tmp_path / "000000008") is None


def test_state_says_what_the_weights_depend_on(tmp_path, state):
    save(tmp_path, state, 8)
    content = json.loads((tmp_path / "000000008" / "state.json").read_text())
    assert content["identity"] == {"recipe": "r"}
    assert sorted(content["files"]) == ["ema.safetensors", "memory.pt", "optimizer.pt", "student.safetensors"]
