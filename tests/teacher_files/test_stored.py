"""Files of tensors are written and read one tensor at a time."""

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from stages.teacher_files.checkpoint.stored import LazyTensor, read_safetensors, write_safetensors

VALUES = {
    "a": torch.randn(3, 2), "b": torch.randn(4).half(), "c": torch.randn(2, 2, 1).bfloat16(), "d": torch.zeros(0, 3),
    "e": torch.tensor(1.5, dtype=torch.float64),
}  # fmt: skip


@dataclass
class Watched:
    """A tensor that counts how many of its kind are held."""

    make: Callable[[], Tensor]
    dtype: torch.dtype = torch.float32
    shape: tuple[int, ...] = (1000,)
    file: Path = Path("x")
    held: list[int] = field(default_factory=list)
    alive: "weakref.WeakSet[Tensor]" = field(default_factory=weakref.WeakSet)

    def read(self) -> Tensor:
        value = self.make()
        self.alive.add(value)
        gc.collect()
        self.held.append(len(self.alive))
        return value


def test_a_file_comes_back_by_this_reader_and_by_the_library(tmp_path: Path) -> None:
    class Held:
        def __init__(self, value: Tensor) -> None:
            self.dtype, self.shape, self.file, self.read = value.dtype, tuple(value.shape), Path("x"), lambda: value

    held: dict[str, LazyTensor] = {name: Held(value) for name, value in VALUES.items()}
    write_safetensors(tmp_path / "x.safetensors", held)
    read = read_safetensors(tmp_path / "x.safetensors", "x", "fetch it").tensors
    library = load_file(tmp_path / "x.safetensors")
    assert read.keys() == library.keys() == VALUES.keys()
    for name, value in VALUES.items():
        assert read[name].dtype == value.dtype
        assert torch.equal(read[name].read(), value)
        assert torch.equal(library[name], value)


def test_no_more_than_two_tensors_are_held_while_a_file_is_written(tmp_path: Path) -> None:
    watched = Watched(lambda: torch.randn(1000))
    write_safetensors(tmp_path / "x.safetensors", dict.fromkeys(map(str, range(20)), watched))
    assert len(watched.held) == 20
    assert max(watched.held) <= 2
