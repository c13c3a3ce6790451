"""Pickles: their tensors are reached, and nothing that they name is run."""

import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stages.system.refusal import Refused
from stages.teacher_files.checkpoint import unpickler
from stages.teacher_files.checkpoint.pickled import read_pickled, tensors_of
from stages.teacher_files.checkpoint.stored import TensorFile

WEIGHTS = {
    "a": torch.arange(12, dtype=torch.float32).view(3, 4),
    "transposed": torch.randn(4, 5).half().t(),
    "part": torch.arange(9.0).bfloat16()[3:7],
    "whole numbers": torch.arange(5),
    "scalar": torch.tensor(2.5),
    "nothing": torch.empty(0, 3),
    "parameter": torch.nn.Parameter(torch.ones(2)),
}
ZIPPED = pytest.mark.parametrize("zipped", [True, False])


def opened(path: Path) -> TensorFile:
    return tensors_of(path, read_pickled(path, f"{path}:", "fetch it"))


class Trainer:
    """A class that no reader of the file knows."""

    def __init__(self) -> None:
        self.history, self.tensor = [1], torch.ones(2)


@ZIPPED
def test_tensors_come_back_as_they_were_saved(tmp_path: Path, zipped: bool) -> None:
    shared = {"all": WEIGHTS["a"], "row": WEIGHTS["a"][1]}
    torch.save({**WEIGHTS, **shared}, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    file = opened(tmp_path / "w.pt")
    assert file.foreign == ()
    for name, value in {**WEIGHTS, **shared}.items():
        assert file.tensors[name].dtype == value.dtype
        assert torch.equal(file.tensors[name].read(), value), name
        assert torch.equal(file.tensors[name].mapped(), value), name


@ZIPPED
@pytest.mark.parametrize("key", ["state_dict", "model", "module", "weights"])
def test_weights_are_taken_out_of_what_trainers_put_round_them(tmp_path: Path, zipped: bool, key: str) -> None:
    content = {
        "epoch": 3, key: OrderedDict(WEIGHTS), "callbacks": {Trainer: Trainer()}, "loss": np.float64(1.5),
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}},
    }  # fmt: skip
    torch.save(content, tmp_path / "w.ckpt", _use_new_zipfile_serialization=zipped)
    file = opened(tmp_path / "w.ckpt")
    assert file.tensors.keys() == WEIGHTS.keys()
    assert file.foreign == (f"{__name__}.Trainer",)


def test_the_tensors_of_a_whole_pickled_module_are_reached(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    torch.save(module, tmp_path / "m.pt")
    file, expected = opened(tmp_path / "m.pt"), module.state_dict()
    assert all(torch.equal(file.tensors[name].read(), value) for name, value in expected.items())


@ZIPPED
@pytest.mark.parametrize("inner", [False, True])
def test_the_attributes_of_a_state_dict_are_passed_over(tmp_path: Path, zipped: bool, inner: bool) -> None:
    expected = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)).state_dict()
    assert hasattr(expected, "_metadata")
    content = {"state_dict": expected, "epoch": 1} if inner else expected
    torch.save(content, tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)
    file = opened(tmp_path / "m.pt")
    assert file.foreign == ()
    assert {name: value.read().tolist() for name, value in file.tensors.items()} == {
        name: value.tolist() for name, value in expected.items()
    }


def test_the_tensors_of_a_module_of_many_levels_are_reached(tmp_path: Path) -> None:
    module: torch.nn.Module = torch.nn.Linear(2, 3)
    for _ in range(9):
        module = torch.nn.Sequential(module)
    torch.save(module, tmp_path / "m.pt")
    assert opened(tmp_path / "m.pt").tensors.keys() == module.state_dict().keys()


class Call:
    """A pickle that calls a function when an ordinary reader opens it."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


HOSTILE: dict[str, Callable[[Path], Any]] = {
    "mkdir": lambda mark: Call(os.mkdir, str(mark)),
    "system": lambda mark: Call(os.system, f"touch {mark}"),
    "eval": lambda mark: Call(eval, f"__import__('os').mkdir({str(mark)!r})"),
    "exec": lambda mark: Call(exec, f"import os; os.mkdir({str(mark)!r})"),
    "nested": lambda mark: [{"x": (Call(os.mkdir, str(mark)),)}],
    "torch's own loader": lambda mark: Call(torch.hub.load_state_dict_from_url, str(mark)),
    "another pickle": lambda mark: Call(pickle.loads, pickle.dumps(Call(os.mkdir, str(mark)))),
}


@ZIPPED
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pickle_runs_nothing_and_gives_its_tensors(tmp_path: Path, zipped: bool, name: str) -> None:
    mark, path = tmp_path / "mark", tmp_path / "e.pt"
    torch.save({"state_dict": WEIGHTS, "x": HOSTILE[name](mark)}, path, _use_new_zipfile_serialization=zipped)
    file = opened(path)
    assert file.tensors.keys() == WEIGHTS.keys()
    assert file.foreign
    assert not mark.exists()


def zip_of(path: Path, program: bytes, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        for name, content in members.items():
            archive.writestr(f"archive/data/{name}", content)
    return path


PROGRAMS = {
    "the reader's own table": b"cstages.teacher_files.checkpoint.unpickler\nREBUILDERS\n.",
    "a module of the standard library": b"cposix\nsystem\n(S'touch MARK'\ntR.",
    "an attribute of torch": b"ctorch\nload\n(S'MARK'\ntR.",
    "a dotted name": b"\x80\x04\x8c\x05torch\x8c\x14_utils.sys.modules.os\x93.",
    "a state for a rebuild function": b"ctorch._utils\n_rebuild_tensor_v2\n(S'meaning'\nNdb.",
    "attributes of a rebuild function": b"ctorch._utils\n_rebuild_tensor_v2\n(N(S'meaning'\nNd\x86b.",
    "attributes of a placeholder": b"cos\nsystem\nN}S'__call__'\nNs\x86b.",
    "a new object of a placeholder": b"cos\nsystem\n)\x81.",
    "an instruction of extensions": b"\x82\x01.",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_no_program_reaches_anything_or_changes_the_reader(tmp_path: Path, name: str, monkeypatch) -> None:
    monkeypatch.setattr(os, "system", lambda _: pytest.fail("it ran"))
    before = dict(unpickler.REBUILDERS)
    path = zip_of(tmp_path / "x.pt", PROGRAMS[name].replace(b"MARK", str(tmp_path / "mark").encode()))
    try:
        content = read_pickled(path, "x:", "fetch it").content
    except Refused:
        content = None
    assert not callable(content)
    assert not (tmp_path / "mark").exists()
    assert before == unpickler.REBUILDERS
    torch.save(WEIGHTS, tmp_path / "w.pt")
    assert torch.equal(opened(tmp_path / "w.pt").tensors["a"].read(), WEIGHTS["a"])


STORAGE = b"(S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI4\ntQ"
VIEW = b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"I%d\n(I%d\nt(I%d\ntI00\nNtR."


@pytest.mark.parametrize("numbers", [(1, 4, 1), (0, 5, 1), (0, 2, 4), (-1, 2, 1), (0, 2, -1), (0, 1 << 60, 1)])
def test_a_tensor_that_would_leave_its_storage_is_refused(tmp_path: Path, numbers: tuple[int, int, int]) -> None:
    path = zip_of(tmp_path / "x.pt", VIEW % numbers, **{"0": bytes(16)})
    with pytest.raises(Refused, match="no whole file"):
        read_pickled(path, "x:", "fetch it")
    whole = zip_of(tmp_path / "y.pt", VIEW % (0, 4, 1), **{"0": bytes(16)})
    assert read_pickled(whole, "y:", "fetch it").content.read().tolist() == [0, 0, 0, 0]


def test_containers_in_themselves_and_many_times_in_others_end(tmp_path: Path) -> None:
    loop: list[Any] = [torch.ones(1)]
    loop.append(loop)
    many: Any = loop
    for _ in range(60):
        many = [many, many]
    torch.save({"a": torch.zeros(2), "many": many}, tmp_path / "x.pt")
    assert "a" in opened(tmp_path / "x.pt").tensors


@pytest.mark.parametrize("cut", [10, 1000, 3000])
@ZIPPED
def test_a_cut_file_is_refused(tmp_path: Path, zipped: bool, cut: int) -> None:
    path = tmp_path / "x.pt"
    torch.save({"a": torch.randn(50, 50)}, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(Refused, match=r"no whole file of torch\.save"):
        opened(path)


def test_a_file_whose_tensors_were_compressed_is_refused_with_the_way_out(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(500)}, tmp_path / "x.pt")
    with (
        zipfile.ZipFile(tmp_path / "x.pt") as old,
        zipfile.ZipFile(tmp_path / "y.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(Refused, match=r"compressed: unpack it and save it with torch\.save"):
        opened(tmp_path / "y.pt")
