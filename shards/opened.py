"""Shards open for reading by offset, each checked against its sha256 before anything is read from it."""

import os
import struct
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar
from weakref import WeakSet

from configs.values import PictureSize
from shards.archive import RecordSpan, Shard
from shards.codec import decode, decode_metadata, landings_in, size_in
from shards.files.handle import FileIdentity, ShardHandle, is_stamped, most_descriptors, write_stamp
from shards.files.local_copy import drop_copy, fetch_ahead, hold_copy, is_remote, register_holder, share_bytes
from shards.integrity import Damaged
from shards.manifest import fault_message
from shards.record import (
    LANDINGS_SCHEMA,
    SCHEMA,
    Record,
    RecordHeader,
    RecordLayout,
    header_span,
    is_latent,
    parse_layout,
    pixels_per_latent,
)
from shards.stream.order import WINDOW
from stages.system.refusal import Refused

Item = TypeVar("Item")

MAX_OPEN_FILES, MAX_OPEN_WINDOWS = 64, 16
"""The files that stay open for up to two sizes, and the sizes for which two windows of files each stay open."""
HEADER_READ_BYTES = 4096
"""Read at once from the beginning of a KEY.safetensors: usually more than its header, times and steps take."""


def comparable_shape(name: str, shape: tuple[int, ...], size: PictureSize | None) -> tuple[int, ...]:
    """What the shape of a record's tensor has in common in all sizes of pictures: of latents all but their sides.

    In the place of the sides it has the pixels that one of their places spans.
    """
    return (*shape[:-2], pixels_per_latent(size, shape[-3:])) if size is not None and is_latent(name) else shape


def landings_text(layout: RecordLayout) -> str:
    """How many landings a record has, for a refusal."""
    return f"{layout.tensors['landing_s'].shape[0]} landings" if "landing_s" in layout.tensors else "no landings"


class OpenShards:
    """The shards used last; one that changes is checked again before its next record. Threads may share it."""

    def __init__(self, folder: Path, sizes: int = 1, schema: int = SCHEMA, largest: int = 1) -> None:
        """`sizes` is the number of picture sizes that are read in turn: each has a window of shards of its own.

        `schema` is that of the manifest, and so of all records; `largest` is the bytes of the largest shard.
        """
        self.folder, self._schema = folder, schema
        self.is_remote = is_remote(folder)
        self._files_each = 2 if self.is_remote else 1  # a copy has a lock beside it
        most = max(MAX_OPEN_FILES, 2 * WINDOW * min(sizes, MAX_OPEN_WINDOWS))
        self._max_open = max(1, min(most, most_descriptors() // self._files_each))
        if self.is_remote:
            self._share_bytes = share_bytes(largest)
            self._max_open = min(self._max_open, self._share_bytes // largest)
        self.most_ahead = min(self._max_open, 2 * WINDOW)
        self._handles: OrderedDict[str, ShardHandle] = OrderedDict()
        self._verified: dict[str, FileIdentity] = {}
        self._lock, self._lock_of = Lock(), dict[str, Lock]()
        self._shapes: list[tuple[str, tuple[int, ...]]] | None = None
        """name and `comparable_shape` of each tensor of the first record: the same, in this order, in every record"""
        with _readers_lock:
            _readers.add(self)
        if self.is_remote:
            register_holder(self)

    def record(self, shard: Shard, span: RecordSpan) -> Record:
        """A whole record, read at once into the memory where its tensors then lie."""
        first = span.json_offset
        content = memoryview(bytearray(span.st_offset + span.st_size - first))
        self.read_into(shard, first, [content], len(content))
        metadata, tensors = content[: span.json_size].tobytes(), content[span.st_offset - first :]
        with self._named_damage(shard, span):
            record = decode(metadata, tensors)
            begin, end = header_span(tensors, span.st_size)
            landings = 0 if record.landings is None else len(record.landings)
            layout = parse_layout(tensors[begin:end].tobytes(), tuple(record.features.by_block), landings)
            self._check_consistency(shard, record.key, layout, record.size)
        return record

    def records(self, shards: Sequence[Shard]) -> Iterator[Record]:
        """Every record of these shards, in their order."""
        numbers = self.obtained_ahead(range(len(shards)), shards, lambda number: [number])
        return (self.record(shards[number], span) for number in numbers for span in shards[number].offsets)

    def obtained_ahead(
        self, items: Iterable[Item], shards: Sequence[Shard], shards_of: Callable[[Item], Collection[int]]
    ) -> Iterable[Item]:
        """The same items; of a remote cache, the shards of later ones are brought to this machine meanwhile.

        `shards_of` gives their places in `shards`. What is wrong with a shard is raised where it is read.
        """
        if not self.is_remote or all((self.folder / shard.file).is_file() for shard in shards):
            return items
        most = min(self.most_ahead, len(shards))
        return fetch_ahead(items, shards_of, lambda number: self._handle(shards[number]), most)

    def header(self, shard: Shard, span: RecordSpan) -> RecordHeader:
        """A record without its large tensors, checked as strictly as a whole one."""
        json_bytes = span.st_offset - span.json_offset
        content = self._read_bytes(shard, span.json_offset, json_bytes + min(HEADER_READ_BYTES, span.st_size))
        start = content[json_bytes:]
        with self._named_damage(shard, span):
            metadata = decode_metadata(content[: span.json_size])
            begin, end = header_span(start, span.st_size)
        if end > len(start):
            start = self._read_bytes(shard, span.st_offset, end)
        with self._named_damage(shard, span):
            layout = parse_layout(start[begin:end], tuple(metadata["blocks"]), landings_in(metadata))
            if (layout.bytes, layout.states) != (span.st_size, metadata["draws"]):
                raise ValueError(
                    f"{layout.states} states in {layout.bytes} bytes, it says {metadata['draws']} in {span.st_size}"
                )
            size = size_in(metadata)
            self._check_consistency(shard, metadata["key"], layout, size)
        return RecordHeader(
            **{name: metadata[name] for name in ("key", "text", "class_name", "guidance_scale")},
            blocks=tuple(metadata["blocks"]),
            k=self._small_tensor(shard, span, layout, "k", start),
            s=self._small_tensor(shard, span, layout, "s", start),
            layout=layout,
            size=size,
        )

    @contextmanager
    def _named_damage(self, shard: Shard, span: RecordSpan) -> Iterator[None]:
        """Turn what the bytes of this record raise into `Damaged` with the file and the offset."""
        try:
            yield
        except (Refused, ValueError) as error:
            fault = f"record at byte {span.json_offset}: {error}"
            raise Damaged(fault_message(self.folder, shard, fault)) from error

    def _check_consistency(self, shard: Shard, key: str, layout: RecordLayout, size: PictureSize | None) -> None:
        """Raise `ValueError` for a record that its shard's entry, or the records read before, contradict."""
        if not shard.first_key <= key <= shard.last_key:
            raise ValueError(f"its key {key} is not one from {shard.first_key} to {shard.last_key}")
        if layout.states != shard.states_per_record:
            raise ValueError(f"record {key} has {layout.states} states, manifest says {shard.states_per_record}")
        if size != shard.size:
            raise ValueError(f"record {key} has size {size}, manifest says {shard.size}")
        if ("landing_x" in layout.tensors) != (self._schema == LANDINGS_SCHEMA):
            raise ValueError(f"record {key} has {landings_text(layout)}, in a cache of schema {self._schema}")
        shapes = [(name, comparable_shape(name, tensor.shape, size)) for name, tensor in layout.tensors.items()]
        if self._shapes is None:
            self._shapes = shapes
        if self._shapes != shapes:
            changed = [name for name, shape in shapes if (name, shape) not in self._shapes]
            raise ValueError(f"record {key} has {', '.join(changed) or 'blocks'} unlike the records before it")

    def _small_tensor(
        self, shard: Shard, span: RecordSpan, layout: RecordLayout, name: str, start: bytes
    ) -> tuple[Any, ...]:
        """k or s, out of the bytes that were read unless it lies beyond them."""
        tensor = layout.tensors[name]
        size = tensor.row_bytes * layout.states
        content = start[tensor.offset : tensor.offset + size]
        if len(content) < size:
            content = self._read_bytes(shard, span.st_offset + tensor.offset, size)
        return struct.unpack(f"<{layout.states}{'q' if name == 'k' else 'f'}", content)

    def read_into(self, shard: Shard, offset: int, buffers: Sequence[memoryview], size: int) -> None:
        """Fill the buffers, which hold `size` bytes together, one after the other from this byte of the tar on."""
        handle = self._handle(shard)  # held while it is read: another thread may leave it out for a new one
        try:
            length = os.preadv(handle.fd, buffers, offset)
        except OSError as error:  # a disk that fails names no file
            raise Refused(fault_message(self.folder, shard, f"cannot be read ({error.strerror})")) from error
        if length != size:
            raise Refused(fault_message(self.folder, shard, f"ends before byte {offset + size}"))

    def read_cached(self, shard: Shard, offset: int, buffers: Sequence[memoryview], size: int) -> bool:
        """`read_into` if no disk has to be waited for; False if it has, or if it cannot be known."""
        handle = self._handle(shard)
        try:
            return os.preadv(handle.fd, buffers, offset, os.RWF_NOWAIT) == size
        except OSError:  # whatever else is wrong, `read_into` says
            return False

    def fetch(self, shard: Shard, first: int, size: int) -> None:
        """Let the system read these bytes of the tar, so that `read_into` need not wait for the disk later."""
        self._handle(shard).fetch(first, size)

    def _read_bytes(self, shard: Shard, offset: int, size: int) -> bytes:
        content = bytearray(size)
        self.read_into(shard, offset, [memoryview(content)], size)
        return bytes(content)

    def _handle(self, shard: Shard) -> ShardHandle:
        handle = self._handles.get(shard.file)
        if handle is not None and handle.is_unchanged():
            return handle
        with self._lock:
            lock = self._lock_of.setdefault(shard.file, Lock())
        with lock:  # one thread reads a shard whole, others go on with other shards
            handle = self._handles.get(shard.file)
            if handle is None or not handle.is_unchanged():
                handle = self._open_verified(shard)
            with self._lock:
                self._handles[shard.file] = handle
                self._handles.move_to_end(shard.file)
                while len(self._handles) > self._max_open:
                    self._handles.popitem(last=False)
        self._close_surplus()
        return handle

    def give_up(self, path: Path) -> None:
        """Close the shard whose copy this is; it is opened again when it is read next."""
        with self._lock:
            files = [file for file, handle in self._handles.items() if handle.hold and handle.hold.path == path]
            for file in files:
                del self._handles[file]

    def give_up_half(self) -> None:
        """Close the first half of the shards: another process waits for room."""
        with self._lock:
            for _ in range(-(-len(self._handles) // 2)):
                self._handles.popitem(last=False)

    def _close_surplus(self) -> None:
        """Close the first shards of the readers with the most until all of this process have what is theirs."""
        with _readers_lock:
            readers = list(_readers)
        most = most_descriptors()
        while sum(reader._files_each * len(reader._handles) for reader in readers) > most:
            if not self._close_one(readers):
                break
        remote = [reader for reader in readers if reader.is_remote]
        while self.is_remote and sum(reader._held_bytes() for reader in remote) > self._share_bytes:
            if not self._close_one(remote):
                break

    def _close_one(self, readers: "Sequence[OpenShards]") -> bool:
        """Close a shard of one of them; False where there is none but the one that this reader has just opened."""
        reader = max(readers, key=lambda one: (len(one._handles), one is not self))
        with reader._lock:
            if len(reader._handles) > (reader is self):
                reader._handles.popitem(last=False)
                return True
        return False

    def _held_bytes(self) -> int:
        with self._lock:
            return sum(handle.identity.size for handle in self._handles.values())

    def _open_verified(self, shard: Shard, may_fetch_again: bool = True) -> ShardHandle:
        """The shard, opened: as it was when it was last read whole, or else read whole now.

        A copy of a remote one that is not what it should be is fetched once more.
        """
        path = self.folder / shard.file
        try:
            hold = hold_copy(path, shard.bytes)
            handle = ShardHandle(path)
        except FileNotFoundError as error:
            raise Refused(fault_message(self.folder, shard, "missing")) from error
        except OSError as error:
            raise Refused(fault_message(self.folder, shard, f"cannot be opened ({error.strerror})")) from error
        handle.hold = hold
        if self._verified.get(shard.file) != handle.identity and not is_stamped(path, shard.sha256, handle.identity):
            fault = shard.fault(self.folder)
            if fault is None and not (handle.is_unchanged() and FileIdentity.from_stat(path.stat()) == handle.identity):
                fault = "changed while it was read"
            if fault and hold is not None:
                hold.release()
                if may_fetch_again:
                    drop_copy(path)
                    return self._open_verified(shard, may_fetch_again=False)
                fault += ", as its store has it; if another machine has made it again, start this command again"
            if fault:
                raise Refused(fault_message(self.folder, shard, fault))
            write_stamp(path, shard.sha256, handle.identity)
        self._verified[shard.file] = handle.identity
        return handle


_readers: "WeakSet[OpenShards]" = WeakSet()
_readers_lock = Lock()
