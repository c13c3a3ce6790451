"""What this machine has read whole and found right: one small file for each shard, so that a sha256 is taken once.

A stamp says that the file with this inode, size and times had this sha256 when all of it was read here. A file that
was written to since, replaced or copied has other times and is read anew. What no time tells - bits that rot beneath
the file system - is found by `sollune shards verify`, which believes no stamp. Stamps lie in the user's cache folder
(XDG_CACHE_HOME), never in the cache of records, which may be somebody else's; removing them costs one reading.

Shards open for reading by offset: nothing is handed out of a shard that was not found right first.
"""

import hashlib
import json
import os
import platform
import struct
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, TypeVar

from shards.archive import RecordSpan, Shard
from shards.codec import decode, decode_metadata
from shards.integrity import Damaged, open_plain_file
from shards.manifest import fault_message
from shards.order import WINDOW
from shards.record import Record, RecordHeader, RecordLayout, header_span, parse_layout
from stages.system.atomic import atomic_write
from stages.system.refusal import Refused

RESTED_SECONDS = 2.0
"""A file younger than this may change again within one tick of its clock, so it is not yet believed."""


class FileIdentity(NamedTuple):
    """What changes when a file is written to, replaced or copied; even its owner cannot set the last one."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def from_stat(cls, stat: os.stat_result) -> "FileIdentity":
        """The facts of an open or closed file."""
        return cls(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


def is_stamped(path: Path, sha256: str, identity: FileIdentity) -> bool:
    """Whether this very file was found to have this sha256 before."""
    try:
        return _stamp_path(path).read_text() == _stamp_text(path, sha256, identity)
    except (OSError, RuntimeError, UnicodeDecodeError):
        return False


def write_stamp(path: Path, sha256: str, identity: FileIdentity) -> None:
    """Remember that this very file has this sha256."""
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


T = TypeVar("T")

MAX_OPEN_FILES = 64
HEADER_READ_BYTES = 4096
"""Read at once from the beginning of a KEY.safetensors: more than its header, its times and steps usually take."""


class ShardHandle:
    """One open file; it closes when nobody reads from it any more, whichever thread that was."""

    def __init__(self, path: Path) -> None:
        self.fd, self.is_prefetched = -1, False
        self.fd = open_plain_file(path, os.O_RDONLY | os.O_CLOEXEC)
        self.identity = FileIdentity.from_stat(os.fstat(self.fd))

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)

    def prefetch(self, size: int) -> None:
        """Let the system fetch all of it, in one sweep, unless a window of such files would not fit into memory.

        The draws of a shard in use are asked for in random order, all within one window: one by one they would cost a
        disk many small reads.
        """
        self.is_prefetched = True
        if 2 * WINDOW * size < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
            os.posix_fadvise(self.fd, 0, size, os.POSIX_FADV_WILLNEED)

    def is_unchanged(self) -> bool:
        """Whether the file is neither written to nor replaced since it was opened."""
        return FileIdentity.from_stat(os.fstat(self.fd)) == self.identity


class OpenShards:
    """The latest few tars; each is checked against its sha256 before anything is read from it (see `stamps`).

    Threads may share it. A shard that changes under its reader is checked again before its next record.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._handles: OrderedDict[str, ShardHandle] = OrderedDict()
        self._verified: dict[str, FileIdentity] = {}
        self._lock, self._lock_of = Lock(), dict[str, Lock]()
        self._shapes: list[tuple[str, tuple[int, ...]]] | None = None
        """name and shape of a row of each tensor of the first record: the same, in this order, in every record"""

    def record(self, shard: Shard, place: RecordSpan) -> Record:
        """A whole record, read at once into the memory where its tensors then lie."""
        first = place.json_offset
        content = memoryview(bytearray(place.st_offset + place.st_size - first))
        self.read_into(shard, first, [content], len(content), prefetch=False)
        said, tensors = content[: place.json_size].tobytes(), content[place.st_offset - first :]
        record = self._call_or_damage(shard, place, decode, said, tensors)
        begin, end = header_span(tensors, place.st_size)
        layout = parse_layout(tensors[begin:end].tobytes(), tuple(record.features.by_block))
        self._call_or_damage(shard, place, self._check_consistency, shard, record.key, layout)
        return record

    def header(self, shard: Shard, place: RecordSpan) -> RecordHeader:
        """A record without its large tensors, judged as strictly as a whole one."""
        between = place.st_offset - place.json_offset
        content = self._read_bytes(shard, place.json_offset, between + min(HEADER_READ_BYTES, place.st_size))
        said, start = self._call_or_damage(shard, place, decode_metadata, content[: place.json_size]), content[between:]
        begin, end = self._call_or_damage(shard, place, header_span, start, place.st_size)
        if end > len(start):
            start = self._read_bytes(shard, place.st_offset, end)
        layout = self._call_or_damage(shard, place, parse_layout, start[begin:end], tuple(said["blocks"]))
        if (layout.bytes, layout.states) != (place.st_size, said["draws"]):
            fault = f"{layout.states} draws in {layout.bytes} bytes, it says {said['draws']} in {place.st_size}"
            raise self._damage(shard, place, fault)
        self._call_or_damage(shard, place, self._check_consistency, shard, said["key"], layout)
        return RecordHeader(
            key=said["key"],
            text=said["text"],
            class_name=said["class_name"],
            guidance_scale=said["guidance_scale"],
            blocks=tuple(said["blocks"]),
            k=self._small_tensor(shard, place, layout, "k", start),
            s=self._small_tensor(shard, place, layout, "s", start),
            layout=layout,
        )

    def _call_or_damage(self, shard: Shard, place: RecordSpan, parse: Callable[..., T], *arguments: object) -> T:
        """What `judge` makes of bytes of this record; its refusals are told with the file and the place."""
        try:
            return parse(*arguments)
        except (Refused, ValueError) as error:
            raise self._damage(shard, place, str(error)) from error

    def _check_consistency(self, shard: Shard, key: str, layout: RecordLayout) -> None:
        """Raise `ValueError` for a record that its shard, or the records read before it, do not lead to expect."""
        if not shard.first_key <= key <= shard.last_key:
            raise ValueError(f"its key {key} is not one from {shard.first_key} to {shard.last_key}")
        if layout.states != shard.states_per_record:
            raise ValueError(f"record {key} has {layout.states} draws, manifest says {shard.states_per_record}")
        shapes = [*layout.shapes().items()]
        if self._shapes is None:
            self._shapes = shapes
        if self._shapes != shapes:
            slips = [name for name, shape in shapes if (name, shape) not in self._shapes]
            raise ValueError(f"record {key} has {', '.join(slips) or 'blocks'} unlike the records before it")

    def _small_tensor(
        self, shard: Shard, place: RecordSpan, layout: RecordLayout, name: str, start: bytes
    ) -> tuple[Any, ...]:
        """A small tensor, out of the bytes that are there already unless it lies beyond them."""
        part = layout.tensors[name]
        size = part.row_bytes * layout.states
        found = start[part.offset : part.offset + size]
        if len(found) < size:
            found = self._read_bytes(shard, place.st_offset + part.offset, size)
        return struct.unpack(f"<{layout.states}{'q' if name == 'k' else 'f'}", found)

    def read_into(
        self, shard: Shard, offset: int, buffers: Sequence[memoryview], size: int, prefetch: bool = True
    ) -> None:
        """Fill the buffers, which hold `size` bytes together, one after the other from this byte of the tar on."""
        opened = self._handle(shard)
        if prefetch and not opened.is_prefetched:
            opened.prefetch(shard.bytes)
        try:
            found = os.preadv(opened.fd, buffers, offset)
        except OSError as error:  # a disk that fails names no file
            raise Refused(fault_message(self.folder, shard, f"cannot be read ({error.strerror})")) from error
        if found != size:
            raise Refused(fault_message(self.folder, shard, f"ends before byte {offset + size}"))

    def _read_bytes(self, shard: Shard, offset: int, size: int) -> bytes:
        content = bytearray(size)
        self.read_into(shard, offset, [memoryview(content)], size, prefetch=False)
        return bytes(content)

    def _handle(self, shard: Shard) -> ShardHandle:
        opened = self._handles.get(shard.file)
        if opened is not None and opened.is_unchanged():
            return opened
        with self._lock:
            lock = self._lock_of.setdefault(shard.file, Lock())
        with lock:  # one thread reads a shard whole, others go on with other shards
            opened = self._handles.get(shard.file)
            if opened is None or not opened.is_unchanged():
                opened = self._open_verified(shard)
            with self._lock:
                self._handles[shard.file] = opened
                self._handles.move_to_end(shard.file)
                while len(self._handles) > MAX_OPEN_FILES:
                    self._handles.popitem(last=False)
        return opened

    def _open_verified(self, shard: Shard) -> ShardHandle:
        """The shard, opened, and right: as it was when it was last read whole, or else read whole now."""
        path = self.folder / shard.file
        try:
            opened = ShardHandle(path)
        except OSError as error:
            raise Refused(fault_message(self.folder, shard, f"cannot be opened ({error.strerror})")) from error
        if self._verified.get(shard.file) != opened.identity and not is_stamped(path, shard.sha256, opened.identity):
            fault = shard.fault(self.folder)
            if fault is None and not (opened.is_unchanged() and FileIdentity.from_stat(path.stat()) == opened.identity):
                fault = "changed while it was read"
            if fault:
                raise Refused(fault_message(self.folder, shard, fault))
            write_stamp(path, shard.sha256, opened.identity)
        self._verified[shard.file] = opened.identity
        return opened

    def _damage(self, shard: Shard, place: RecordSpan, fault: str) -> Refused:
        return Damaged(fault_message(self.folder, shard, f"record at byte {place.json_offset}: {fault}"))
