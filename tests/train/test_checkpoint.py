import shutil
from random import Random
from types import SimpleNamespace

import pytest
import torch

from benchmarks import saving
from stages.system.refusal import Refused
from stages.train.checkpoint import Checkpoints
from stages.train.checkpoint_store import CheckpointMeta, KeepConfig, fault_of, identity_differences
from stages.train.ema import Ema
from stages.train.optim import OptimizerConfig, build_optimizer, set_learning_rate
from stages.train.state import TrainingState

FILES = ["student.safetensors", "ema.safetensors", "optimizer.pt", "memory.pt", "state.json"]


@pytest.fixture
def state(toy) -> TrainingState:
    state = TrainingState(toy, Ema(toy), build_optimizer(OptimizerConfig(), dict(toy.named_parameters())))
    toy.conv.weight.sum().backward()
    state.optimizer.step()
    return state


def save(folder, state, *samples: int, keep: int = 2, scores: dict[int, float] | None = None) -> Checkpoints:
    checkpoints = Checkpoints(folder, {"recipe": "r"}, KeepConfig(last=keep))
    for n in samples:
        state.samples = n
        checkpoints.save(state, (scores or {}).get(n))
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


def test_a_whole_checkpoint_that_lacks_only_its_name_gets_it(tmp_path, state, capsys):
    checkpoints = save(tmp_path, state, 8, 16)
    (tmp_path / "000000016").rename(tmp_path / ".000000016.partial")
    shutil.copytree(tmp_path / "000000008", tmp_path / "000000016")  # a broken one with the same name
    assert checkpoints.restore(state, "auto") == tmp_path / "000000016"
    assert names(tmp_path) == ["000000008", "000000016"]
    assert fault_of(tmp_path / "000000016") is None
    assert "whole but for its name" in capsys.readouterr().out


@pytest.mark.parametrize("file", FILES)
def test_any_flipped_bit_or_cut_is_passed_over_and_left_as_it_is(tmp_path, capsys, file):
    saving.save_repeatedly(tmp_path, tmp_path.with_suffix(".returned"), 24)
    bit = Random(file).randrange(8 * (tmp_path / "000000024" / file).stat().st_size)
    for way in (saving.flip_bit, saving.truncate_before_bit):
        assert saving.damage_and_check(tmp_path, file, way(bit)) == []
        assert f"000000024: passed over, {file} " in capsys.readouterr().out


def test_the_metadata_is_sealed(tmp_path, state):
    save(tmp_path, state, 8)
    path = tmp_path / "000000008" / "state.json"
    path.write_text(path.read_text().replace('"recipe": "r"', '"recipe": "s"'))
    assert fault_of(tmp_path / "000000008") == "state.json is not the file that was written"


def test_a_process_that_dies_loses_no_checkpoint_whose_saving_had_ended(tmp_path):
    rng = Random(0)
    for _life in range(4):
        assert saving.kill_and_check(tmp_path / "life", rng.uniform(0.05, 0.3), 64) == []
    assert saving.last_completed(tmp_path / "life.returned") > 0


def test_dying_before_any_step_on_the_disk_loses_nothing(tmp_path):
    met, wrong = saving.kill_at_each_step(tmp_path, 40, range(0, 10**6, 6))
    assert wrong == []
    assert met > 5


@pytest.mark.parametrize("share", [0.0, 0.2, 0.9])
def test_a_disk_that_is_full_in_the_middle_of_a_file_changes_nothing(tmp_path, share):
    saving.save_repeatedly(tmp_path, tmp_path.with_suffix(".returned"), 24)
    largest = max(path.stat().st_size for path in (tmp_path / "000000024").iterdir())
    assert saving.fill_disk_and_check(tmp_path, int(share * largest)) == []


def test_the_best_survives_rotation_and_a_restart(tmp_path, state):
    save(tmp_path, state, 8, 16, 24, 32, scores={8: 0.3, 16: 0.1, 24: 0.2, 32: float("nan")})
    save(tmp_path, state, 40, 48)  # another process: it reads the scores from the disk
    assert names(tmp_path) == ["000000016", "000000040", "000000048"]
    assert CheckpointMeta.read(tmp_path / "000000016").score == 0.1


def test_a_broken_checkpoint_does_not_count_as_kept(tmp_path, state):
    checkpoints = save(tmp_path, state, 8, 16, 24, keep=3)
    (tmp_path / "000000024" / "ema.safetensors").write_bytes(b"rot")
    checkpoints.restore(state, "auto")
    save(tmp_path, state, 20, keep=2)  # it is older than the broken one, which would have been among the last two
    assert names(tmp_path) == ["000000016", "000000020", "000000024"]
    (tmp_path / "000000016" / "ema.safetensors").write_bytes(b"rot")
    save(tmp_path, state, 22, keep=2)
    assert names(tmp_path) == ["000000020", "000000022", "000000024"]


def test_the_last_good_one_goes_only_after_the_new_one_was_read_back(tmp_path, state, monkeypatch):
    checkpoints = save(tmp_path, state, 8, keep=1)
    order: list[str] = []
    store = checkpoints.store
    discard, is_intact = store.discard, store.is_intact
    monkeypatch.setattr(store, "discard", lambda folder: (order.append(f"{folder.name} goes"), discard(folder)))
    monkeypatch.setattr(store, "is_intact", lambda folder: order.append(f"{folder.name} read") or is_intact(folder))
    state.samples = 16
    checkpoints.save(state)
    assert order[0] == ".000000016.partial read"
    assert order[-1] == "000000008 goes"


def test_a_missing_checkpoint_is_fetched(tmp_path, state, capsys):
    there, here = tmp_path / "there", tmp_path / "here"
    save(there, state, 8)
    fetched_into = []

    def fetch(folder):
        fetched_into.append(folder)
        return shutil.copytree(there / "000000008", folder / "000000008")

    checkpoints = save(here, state, 16)
    assert checkpoints.restore(state, "auto", fetch) == here / "000000016"
    assert fetched_into == []
    (here / "000000016" / "student.safetensors").unlink()
    assert checkpoints.restore(state, "auto", fetch) == here / "000000008"
    assert (state.samples, len(fetched_into)) == (8, 1)
    assert [path.name for path in sorted(here.iterdir())] == ["000000008", "000000016"]
    output = capsys.readouterr().out
    assert "000000016: passed over, student.safetensors is missing" in output
    assert "000000008: taken" in output


def test_a_fetched_checkpoint_is_verified(tmp_path, state, capsys):
    there, here = tmp_path / "there", tmp_path / "here"
    save(there, state, 8)
    (there / "000000008" / "ema.safetensors").write_bytes(b"another")
    here.mkdir()
    checkpoints = Checkpoints(here, {"recipe": "r"}, KeepConfig())
    fetch = lambda folder: shutil.copytree(there / "000000008", folder / "000000008")  # noqa: E731
    assert checkpoints.restore(state, "auto", fetch) is None
    assert "passed over, ema.safetensors is not the file" in capsys.readouterr().out
    assert checkpoints.restore(state, "auto", lambda _folder: None) is None


def test_every_fault_of_a_folder_has_a_message(tmp_path, state):
    save(tmp_path, state, 8)
    folder = tmp_path / "000000008"
    assert fault_of(folder) is None
    assert "16 samples" not in (fault_of(folder.rename(tmp_path / "000000016")) or "")
    folder = tmp_path / "000000016"
    assert fault_of(folder) == "state.json is of 8 samples"
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
        Checkpoints(tmp_path, {"recipe": "another"}, KeepConfig()).restore(state, "auto")


def test_longer_training_is_refused_because_of_its_cosine():
    (line,) = identity_differences({"train": {"max_samples": 8, "seed": 0}}, {"train": {"max_samples": 9, "seed": 0}})
    assert line == "train.max_samples was 8, is 9: the learning rate's cosine would change"


def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path, state):
    checkpoints = save(tmp_path, state, 8)
    with pytest.raises(Refused, match="holds a run already"):
        checkpoints.restore(state, "never")


def test_a_disk_without_space_is_refused_before_anything_is_written(tmp_path, state, monkeypatch):
    checkpoints = save(tmp_path, state, 8)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=1000))
    state.samples = 16
    with pytest.raises(Refused, match=r"0\.0 MiB free, a checkpoint takes 1\.0 MiB"):
        checkpoints.save(state)
    assert names(tmp_path) == ["000000008"]


def test_the_last_good_one_stays_when_the_new_one_reads_back_wrongly(tmp_path, state, monkeypatch):
    checkpoints = save(tmp_path, state, 8, keep=1)
    monkeypatch.setattr("stages.train.checkpoint_store.fault_of", lambda _folder: "it rotted")
    monkeypatch.setattr("stages.train.checkpoint.fault_of", lambda _folder: "it rotted")
    state.samples = 16
    with pytest.raises(Refused, match="it rotted"):
        checkpoints.save(state)
    assert fault_of(tmp_path / "000000008") is None


def test_metadata_hold_the_identity_and_all_files(tmp_path, state):
    save(tmp_path, state, 8)
    meta = CheckpointMeta.read(tmp_path / "000000008")
    assert meta.identity == {"recipe": "r"}
    assert sorted(meta.files) == ["ema.safetensors", "memory.pt", "optimizer.pt", "student.safetensors"]


@pytest.mark.parametrize("kind", ["weights", "moments", "optimizer.pt", "memory.pt", "memory without a part"])
def test_a_whole_checkpoint_of_another_shape_is_refused_and_left(tmp_path, state, kind):
    save(tmp_path, state, 8)
    folder = tmp_path / "000000008"
    if kind == "weights":
        state.student = torch.nn.Linear(5, 7)
    elif kind == "moments":
        optimizer = state.optimizer.state_dict()
        optimizer["state"][0]["exp_avg"] = torch.zeros(2, 2)
        torch.save(optimizer, folder / "optimizer.pt")
    elif kind == "memory without a part":
        torch.save({"judge": {}}, folder / "memory.pt")
    else:
        torch.save({"state": {0: torch.zeros(3)}, "param_groups": []}, folder / kind)
    before = names(tmp_path)
    with pytest.raises(Refused, match=r"000000008: does not fit this run \(.*\) - choose another run folder"):
        state.read(folder, 8)
    assert names(tmp_path) == before


def test_momentum_of_another_shape_is_refused_under_muon_too(tmp_path):
    network = torch.nn.ModuleDict({"down_blocks": torch.nn.ModuleList([torch.nn.Linear(4, 3)])})
    optimizer = build_optimizer(OptimizerConfig(kind="muon"), dict(network.named_parameters()))
    state = TrainingState(network, Ema(network), optimizer)
    network["down_blocks"][0](torch.ones(2, 4)).sum().backward()
    optimizer.step()
    save(tmp_path, state, 8)
    state.read(tmp_path / "000000008", 8)
    content = optimizer.state_dict()
    content["muon"]["state"][0]["momentum_buffer"] = torch.zeros(2, 2)
    torch.save(content, tmp_path / "000000008" / "optimizer.pt")
    with pytest.raises(Refused, match=r"momentum_buffer has shape \[2, 2\], its parameter \[3, 4\]"):
        state.read(tmp_path / "000000008", 8)


def test_lack_of_memory_is_no_fault_of_a_checkpoint(tmp_path, state, monkeypatch):
    save(tmp_path, state, 8)

    def none_left(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "load", none_left)
    with pytest.raises(torch.OutOfMemoryError):
        state.read(tmp_path / "000000008", 8)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("layouts", [(False, True), (True, False), (True, True)])
def test_another_memory_format_at_a_resume_changes_only_rounding(tmp_path, kind, layouts):
    def state(is_last: bool) -> TrainingState:
        network = torch.nn.ModuleDict({"mid_block": torch.nn.Conv2d(4, 6, 3), "other": torch.nn.Conv2d(3, 2, (2, 3))})
        for number, parameter in enumerate(network.parameters()):
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        if is_last:
            network.to(memory_format=torch.channels_last)
        optimizer = build_optimizer(OptimizerConfig(kind=kind), dict(network.named_parameters()))
        return TrainingState(network, Ema(network), optimizer, arithmetic={"channels_last": is_last})

    def step(trained: TrainingState, seed: int) -> None:
        for number, parameter in enumerate(trained.student.parameters()):
            values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(10 * seed + number))
            parameter.grad = torch.empty_like(parameter).copy_(values)
        set_learning_rate(trained.optimizer, 0.01)
        trained.optimizer.step()

    before, resumed = state(layouts[0]), state(layouts[1])
    step(before, 1)
    before.write(tmp_path)
    resumed.read(tmp_path, 8)
    for seed in (2, 3):
        step(before, seed)
        step(resumed, seed)
    for one, other in zip(before.student.parameters(), resumed.student.parameters(), strict=True):
        torch.testing.assert_close(other, one, atol=1e-6, rtol=0)
