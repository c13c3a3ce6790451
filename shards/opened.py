"""Shards open for reading by offset, each checked against its sha256 before anything is read from it.

A stamp in the user's cache folder (XDG_CACHE_HOME, never the cache of records, which may belong to another user) holds
that the file with this inode, size and times had this sha256 when all of it was read on this machine. A file that was
written to since, replaced or copied has other times and is read again. Bits that rot beneath the file system change no
time: `sollune shards verify` finds them, because it uses no stamp. Removing stamps costs one reading.
"""

import hashlib
import json
import os
import platform
import struct
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

from configs.values import PictureSize
from shards.archive import RecordSpan, Shard
from shards.codec import decode, decode_metadata, landings_in, size_in
from shards.integrity import Damaged, open_plain_file
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
from stages.system.atomic import atomic_write
from stages.system.refusal import Refused

RESTED_SECONDS = 2.0
"""A file younger than this may change again within one tick of its clock, so it is not stamped yet."""


class FileIdentity(NamedTuple):
    """What changes when a file is written to, replaced or copied; even its owner cannot set the last one."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def from_stat(cls, stat: os.stat_result) -> "FileIdentity":
        """The identity of an open or closed file."""
        return cls(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


def is_stamped(path: Path, sha256: str, identity: FileIdentity) -> bool:
    """Whether a stamp holds that this very file has this sha256."""
    try:
        return _stamp_path(path).read_text() == _stamp_text(path, sha256, identity)
    except (OSError, RuntimeError, UnicodeDecodeError):
        return False


def write_stamp(path: Path, sha256: str, identity: FileIdentity) -> None:
    """Stamp this very file with its sha256, unless it is too young."""
    if time.time_ns() - max(identity.mtime_ns, identity.ctime_ns) < RESTED_SECONDS * 1e9:
        return
    with suppress(OSError, RuntimeError, Refused):  # without stamps every run reads the shards whole: slower, as safe
        atomic_write(_stamp_path(path), _stamp_text(path, sha256, identity))


def _stamp_path(path: Path) -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = hashlib.sha256(f"{platform.node()}\0{path.resolve()}".encode()).hexdigest()
    return home / "sollune" / "verified" / name[:2] / name[2:]


def _stamp_text(path: Path, sha256: str, identity: FileIdentity) -> str:
    return json.dumps({"file": str(path.resolve()), "sha256": sha256, **identity._asdict()}, indent=1) + "\n"


MAX_OPEN_FILES, MAX_OPEN_WINDOWS = 64, 16
"""The files that stay open for up to two sizes, and the sizes for which two windows of files each stay open."""
HEADER_READ_BYTES = 4096
"""Read at once from the beginning of a KEY.safetensors: usually more than its header, times and steps take."""


class ShardHandle:
    """One open file; it closes with its last reference, in whichever thread that was."""

    def __init__(self, path: Path) -> None:
        self.fd, self.is_prefetched = -1, False
        self.fd = open_plain_file(path, os.O_RDONLY | os.O_CLOEXEC)
        self.identity = FileIdentity.from_stat(os.fstat(self.fd))

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)

    def prefetch(self, size: int, windows: int) -> None:
        """Let the system fetch all of it in one sweep, unless so many windows of such files would not fit into memory.

        Its states are read in random order within one window: one by one they would cost a disk many small reads.
        """
        self.is_prefetched = True
        if 2 * WINDOW * windows * size < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
            os.posix_fadvise(self.fd, 0, size, os.POSIX_FADV_WILLNEED)

    def is_unchanged(self) -> bool:
        """Whether the open file is as it was when it was opened."""
        return FileIdentity.from_stat(os.fstat(self.fd)) == self.identity


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

    def __init__(self, folder: Path, sizes: int = 1, schema: int = SCHEMA) -> None:
        """`sizes` is the number of picture sizes that are read in turn: each has a window of shards of its own.

        `schema` is that of the manifest, and so of all records.
        """
        self.folder, self._schema, self._sizes = folder, schema, sizes
        self._max_open = max(MAX_OPEN_FILES, 2 * WINDOW * min(sizes, MAX_OPEN_WINDOWS))
        self._handles: OrderedDict[str, ShardHandle] = OrderedDict()
        self._verified: dict[str, FileIdentity] = {}
        self._lock, self._lock_of = Lock(), dict[str, Lock]()
        self._shapes: list[tuple[str, tuple[int, ...]]] | None = None
        """name and `comparable_shape` of each tensor of the first record: the same, in this order, in every record"""

    def record(self, shard: Shard, span: RecordSpan) -> Record:
        """A whole record, read at once into the memory where its tensors then lie."""
        first = span.json_offset
        content = memoryview(bytearray(span.st_offset + span.st_size - first))
        self.read_into(shard, first, [content], len(content), prefetch=False)
        metadata, tensors = content[: span.json_size].tobytes(), content[span.st_offset - first :]
        with self._named_damage(shard, span):
            record = decode(metadata, tensors)
            begin, end = header_span(tensors, span.st_size)
            landings = 0 if record.landings is None else len(record.landings)
            layout = parse_layout(tensors[begin:end].tobytes(), tuple(record.features.by_block), landings)
            self._check_consistency(shard, record.key, layout, record.size)
        return record

    def records(self, shards: Iterable[Shard]) -> Iterator[Record]:
        """Every record of these shards, in their order."""
        return (self.record(shard, span) for shard in shards for span in shard.offsets)

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

    def read_into(
        self, shard: Shard, offset: int, buffers: Sequence[memoryview], size: int, prefetch: bool = True
    ) -> None:
        """Fill the buffers, which hold `size` bytes together, one after the other from this byte of the tar on."""
        handle = self._handle(shard)
        if prefetch and not handle.is_prefetched:
            handle.prefetch(shard.bytes, self._sizes)
        try:
            length = os.preadv(handle.fd, buffers, offset)
        except OSError as error:  # a disk that fails names no file
            raise Refused(fault_message(self.folder, shard, f"cannot be read ({error.strerror})")) from error
        if length != size:
            raise Refused(fault_message(self.folder, shard, f"ends before byte {offset + size}"))

    def _read_bytes(self, shard: Shard, offset: int, size: int) -> bytes:
        content = bytearray(size)
        self.read_into(shard, offset, [memoryview(content)], size, prefetch=False)
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
        return handle

    def _open_verified(self, shard: Shard) -> ShardHandle:
        """The shard, opened: as it was when it was last read whole, or else read whole now."""
        path = self.folder / shard.file
        try:
            handle = ShardHandle(path)
        except OSError as error:
            raise Refused(fault_message(self.folder, shard, f"cannot be opened ({error.strerror})")) from error
        if self._verified.get(shard.file) != handle.identity and not is_stamped(path, shard.sha256, handle.identity):
            fault = shard.fault(self.folder)
            if fault is None and not (handle.is_unchanged() and FileIdentity.from_stat(path.stat()) == handle.identity):
                fault = "changed while it was read"
            if fault:
                raise Refused(fault_message(self.folder, shard, fault))
            write_stamp(path, shard.sha256, handle.identity)
        self._verified[shard.file] = handle.identity
        return handle
