"""Reads a pickle without running anything that it names.

A pickle is a program for a small machine: it imports names and calls them. Here no name is ever imported. torch's own
functions that make a tensor of a part of a storage are imitated, so that a tensor is known by its place in the file;
every other class or function becomes an inert placeholder, which can be called and filled and does nothing.
"""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple

import torch

from stages.teacher_files.checkpoint.stored import DTYPE_NAMES

STORAGE_TYPES = {
    f"{name}Storage": dtype
    for name, dtype in (
        ("Double", torch.float64), ("Float", torch.float32), ("Half", torch.float16), ("BFloat16", torch.bfloat16),
        ("Long", torch.int64), ("Int", torch.int32), ("Short", torch.int16), ("Char", torch.int8),
        ("Byte", torch.uint8), ("Bool", torch.bool), ("Untyped", torch.uint8),
    )
}  # fmt: skip
"""The last word of a storage class -> the type of its elements."""


class _InertType(type):
    """Classes that a pickle cannot change."""

    def __setattr__(cls, name: str, value: object) -> None:
        raise pickle.UnpicklingError(f"{name} of a placeholder cannot be set")


class Inert(metaclass=_InertType):
    """A foreign object of a pickle: it takes any state and call, keeps the state, and does nothing."""

    __slots__ = ("state",)

    def __new__(cls, *_args: object, **_named: object) -> "Inert":
        made = object.__new__(cls)
        made.state = None
        return made

    def __init__(self, *args: object, **named: object) -> None:
        pass

    def __call__(self, *_args: object, **_named: object) -> "Inert":
        return self

    def __setstate__(self, state: object) -> None:
        self.state = state

    def __setitem__(self, key: object, value: object) -> None:
        pass

    def append(self, value: object) -> None:
        """Ignore an item of a list-like object."""

    def extend(self, values: object) -> None:
        """Ignore items of a list-like object."""

    def add(self, value: object) -> None:
        """Ignore an item of a set-like object."""


class Storage(NamedTuple):  # a tuple, which no instruction of a pickle can change
    """A part of a file that tensors are views of."""

    key: str
    dtype: torch.dtype
    elements: int


class View(NamedTuple):
    """A tensor as a view of a storage; its place in the file is known once all storages are."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _StandIn:
    """What the reader puts in the place of a name of torch's; no instruction of a pickle can change it."""

    __slots__ = ("meaning",)
    meaning: Any

    def __init__(self, meaning: Any) -> None:
        object.__setattr__(self, "meaning", meaning)

    def __setattr__(self, name: str, value: object) -> None:
        raise pickle.UnpicklingError(f"{name} of a stand-in cannot be set")


class _StorageType(_StandIn):
    """The class of a storage; its meaning is the type of the elements."""

    __slots__ = ()


class _Rebuild(_StandIn):
    """One of the functions that make a tensor or a container."""

    __slots__ = ()

    def __call__(self, *args: Any) -> Any:
        return self.meaning(*args)


def _view(storage: Any, offset: Any, shape: Any, stride: Any, *_rest: Any) -> View:
    """`torch._utils._rebuild_tensor_v2`: a view, refused where it would leave its storage."""
    return _checked_view(storage, storage.dtype, offset, shape, stride)


def _view_of_type(
    storage: Any, offset: Any, shape: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, *_rest: Any
) -> View:
    """`torch._utils._rebuild_tensor_v3`: a view of bytes as another type."""
    return _checked_view(storage, dtype, offset, shape, stride)


def _checked_view(storage: Any, dtype: Any, offset: Any, shape: Any, stride: Any) -> View:
    numbers = (offset, *shape, *stride)
    if not isinstance(storage, Storage) or dtype not in DTYPE_NAMES or len(shape) != len(stride):
        raise pickle.UnpicklingError("a tensor of no storage")
    if any(type(number) is not int or number < 0 for number in numbers):
        raise pickle.UnpicklingError("a tensor of a negative size")
    last = offset + sum((length - 1) * step for length, step in zip(shape, stride, strict=True))
    if 0 not in shape and (last + 1) * dtype.itemsize > storage.elements * storage.dtype.itemsize:
        raise pickle.UnpicklingError("a tensor beyond its storage")
    return View(storage, dtype, offset, tuple(shape), tuple(stride))


def _parameter(data: Any, *_rest: Any) -> Any:
    """`torch._utils._rebuild_parameter`: the tensor itself."""
    return data


def _from_type(function: Any, _type: Any, args: Any, _state: Any) -> Any:
    """`torch._tensor._rebuild_from_type_v2`: what the inner function makes, if it is one of these."""
    return function(*args) if isinstance(function, _Rebuild) else Inert()


def _plain_tuple(values: Any = ()) -> Any:
    """`torch.Size`."""
    return tuple(values)


class _Dict(dict[Any, Any]):
    """A dictionary of `collections`, which may have attributes: torch's `state_dict()` has its `_metadata` there."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        """Ignore the attributes."""


def _ordered_dict(items: Any = ()) -> _Dict:
    """`collections.OrderedDict`, as a plain one."""
    return _Dict(items)


def _empty_dict(*_args: Any) -> _Dict:
    """`collections.defaultdict` and `Counter`, which are filled item by item."""
    return _Dict()


REBUILDERS: Mapping[str, Any] = {
    "torch._utils._rebuild_tensor": _Rebuild(_view),
    "torch._utils._rebuild_tensor_v2": _Rebuild(_view),
    "torch._utils._rebuild_tensor_v3": _Rebuild(_view_of_type),
    "torch._utils._rebuild_parameter": _Rebuild(_parameter),
    "torch._utils._rebuild_parameter_with_state": _Rebuild(_parameter),
    "torch._tensor._rebuild_from_type_v2": _Rebuild(_from_type),
    "torch.Size": _Rebuild(_plain_tuple),
    "collections.OrderedDict": _Rebuild(_ordered_dict),
    "collections.defaultdict": _Rebuild(_empty_dict),
    "collections.Counter": _Rebuild(_empty_dict),
}
"""What the reader puts in the place of a name; anything else becomes an `Inert`."""
HARMLESS = {"torch.device", "torch.serialization._get_layout", "_codecs.encode", "numpy.dtype", "builtins.set"}
HARMLESS |= {f"{core}.multiarray.scalar" for core in ("numpy.core", "numpy._core")}
HARMLESS |= {"__builtin__.set", "builtins.dict", "__builtin__.dict"}
"""Names that become an `Inert` too, and are not worth a word."""


@dataclass
class PickleReader:
    """What the unpicklers of one file have met."""

    storages: dict[str, Storage] = field(default_factory=dict)
    foreign: list[str] = field(default_factory=list)

    def load(self, stream: IO[bytes]) -> Any:
        """The next object of a stream."""
        unpickler = _Unpickler(stream, encoding="latin1")
        unpickler.reader = self
        return unpickler.load()


class _Unpickler(pickle.Unpickler):
    reader: PickleReader

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a name; nothing is imported."""
        full = f"{module}.{name}"
        if full in REBUILDERS:
            return REBUILDERS[full]
        if module in ("torch", "torch.cuda", "torch.storage") and name in STORAGE_TYPES:
            return _StorageType(STORAGE_TYPES[name])
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        if full not in HARMLESS and full not in self.reader.foreign:
            self.reader.foreign.append(full)
        return Inert

    def persistent_load(self, pid: Any) -> Any:
        """A storage, by its key; raises `UnpicklingError` for anything else."""
        if pid[0] == "module":  # a class with its source text, in the format before
            return pid[1]
        kind, storage_type, key, _device, elements, *view = pid
        if kind != "storage" or not isinstance(storage_type, _StorageType) or type(elements) is not int or any(view):
            raise pickle.UnpicklingError(f"a reference to {str(kind)[:20]!r}")
        storage = self.reader.storages.setdefault(str(key), Storage(str(key), storage_type.meaning, elements))
        if storage.elements != elements or storage.dtype != storage_type.meaning or elements < 0:
            raise pickle.UnpicklingError(f"two sizes of storage {str(key)[:20]!r}")
        return storage
