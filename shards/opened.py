"""Shards open for reading by offset: nothing is handed out of a shard that was not found right first."""

import os
import struct
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

from configs.refusal import Refused
from shards.archive import Place
from shards.codec import decode, head
from shards.damage import Damaged, plainly
from shards.entries import Shard
from shards.layout import Head, Layout, header_of, layout_of
from shards.manifest import refusal
from shards.order import WINDOW
from shards.record import Record
from shards.stamps import Facts, is_stamped, stamp

T = TypeVar("T")

MOST_OPEN = 64
GUESS_BYTES = 4096
"""Read at once from the beginning of a KEY.safetensors: more than its header, its times and steps usually take."""


class Opened:
    """One open file; it closes when nobody reads from it any more, whichever thread that was."""

    def __init__(self, path: Path) -> None:
        self.fd, self.asked_ahead = -1, False
        self.fd = plainly(path, os.O_RDONLY | os.O_CLOEXEC)
        self.facts = Facts.of(os.fstat(self.fd))

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)

    def ask_ahead(self, size: int) -> None:
        """Let the system fetch all of it, in one sweep, unless a window of such files would not fit into memory.

        The draws of a shard in use are asked for in random order, all within one window: one by one they would cost a
        disk many small reads.
        """
        self.asked_ahead = True
        if 2 * WINDOW * size < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
            os.posix_fadvise(self.fd, 0, size, os.POSIX_FADV_WILLNEED)

    def is_as_it_was(self) -> bool:
        """Whether the file is neither written to nor replaced since it was opened."""
        return Facts.of(os.fstat(self.fd)) == self.facts


class OpenShards:
    """The latest few tars; each is checked against its sha256 before anything is read from it (see `stamps`).

    Threads may share it. A shard that changes under its reader is checked again before its next record.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._opened: OrderedDict[str, Opened] = OrderedDict()
        self._right: dict[str, Facts] = {}
        self._lock, self._lock_of = Lock(), dict[str, Lock]()
        self._shapes: list[tuple[str, tuple[int, ...]]] | None = None
        """name and shape of a row of each tensor of the first record: the same, in this order, in every record"""

    def record(self, shard: Shard, place: Place) -> Record:
        """A whole record, read at once into the memory where its tensors then lie."""
        first = place.json_offset
        content = memoryview(bytearray(place.st_offset + place.st_size - first))
        self.read_into(shard, first, [content], len(content), ask_ahead=False)
        said, tensors = content[: place.json_size].tobytes(), content[place.st_offset - first :]
        record = self._judged(shard, place, decode, said, tensors)
        begin, end = header_of(tensors, place.st_size)
        layout = layout_of(tensors[begin:end].tobytes(), tuple(record.features.by_block))
        self._judged(shard, place, self._belongs, shard, record.key, layout)
        return record

    def head(self, shard: Shard, place: Place) -> Head:
        """A record without its large tensors, judged as strictly as a whole one."""
        between = place.st_offset - place.json_offset
        content = self._bytes(shard, place.json_offset, between + min(GUESS_BYTES, place.st_size))
        said, start = self._judged(shard, place, head, content[: place.json_size]), content[between:]
        begin, end = self._judged(shard, place, header_of, start, place.st_size)
        if end > len(start):
            start = self._bytes(shard, place.st_offset, end)
        layout = self._judged(shard, place, layout_of, start[begin:end], tuple(said["blocks"]))
        if (layout.bytes, layout.rows) != (place.st_size, said["draws"]):
            fault = f"{layout.rows} draws in {layout.bytes} bytes, it says {said['draws']} in {place.st_size}"
            raise self._refused(shard, place, fault)
        self._judged(shard, place, self._belongs, shard, said["key"], layout)
        return Head(
            key=said["key"],
            text=said["text"],
            class_name=said["class_name"],
            guidance_scale=said["guidance_scale"],
            blocks=tuple(said["blocks"]),
            k=self._column(shard, place, layout, "k", start),
            s=self._column(shard, place, layout, "s", start),
            layout=layout,
        )

    def _judged(self, shard: Shard, place: Place, judge: Callable[..., T], *words: object) -> T:
        """What `judge` makes of bytes of this record; its refusals are told with the file and the place."""
        try:
            return judge(*words)
        except (Refused, ValueError) as error:
            raise self._refused(shard, place, str(error)) from error

    def _belongs(self, shard: Shard, key: str, layout: Layout) -> None:
        """Raise `ValueError` for a record that its shard, or the records read before it, do not lead to expect."""
        if not shard.first_key <= key <= shard.last_key:
            raise ValueError(f"its key {key} is not one from {shard.first_key} to {shard.last_key}")
        if layout.rows != shard.draws_per_record:
            raise ValueError(f"record {key} has {layout.rows} draws, manifest says {shard.draws_per_record}")
        shapes = [*layout.shapes().items()]
        if self._shapes is None:
            self._shapes = shapes
        if self._shapes != shapes:
            slips = [name for name, shape in shapes if (name, shape) not in self._shapes]
            raise ValueError(f"record {key} has {', '.join(slips) or 'blocks'} unlike the records before it")

    def _column(self, shard: Shard, place: Place, layout: Layout, name: str, start: bytes) -> tuple[Any, ...]:
        """A small tensor, out of the bytes that are there already unless it lies beyond them."""
        part = layout.parts[name]
        size = part.row_bytes * layout.rows
        found = start[part.offset : part.offset + size]
        if len(found) < size:
            found = self._bytes(shard, place.st_offset + part.offset, size)
        return struct.unpack(f"<{layout.rows}{'q' if name == 'k' else 'f'}", found)

    def read_into(
        self, shard: Shard, offset: int, buffers: Sequence[memoryview], size: int, ask_ahead: bool = True
    ) -> None:
        """Fill the buffers, which hold `size` bytes together, one after the other from this byte of the tar on."""
        opened = self._handle(shard)
        if ask_ahead and not opened.asked_ahead:
            opened.ask_ahead(shard.bytes)
        try:
            found = os.preadv(opened.fd, buffers, offset)
        except OSError as error:  # a disk that fails names no file
            raise Refused(refusal(self.folder, shard, f"cannot be read ({error.strerror})")) from error
        if found != size:
            raise Refused(refusal(self.folder, shard, f"ends before byte {offset + size}"))

    def _bytes(self, shard: Shard, offset: int, size: int) -> bytes:
        content = bytearray(size)
        self.read_into(shard, offset, [memoryview(content)], size, ask_ahead=False)
        return bytes(content)

    def _handle(self, shard: Shard) -> Opened:
        opened = self._opened.get(shard.file)
        if opened is not None and opened.is_as_it_was():
            return opened
        with self._lock:
            lock = self._lock_of.setdefault(shard.file, Lock())
        with lock:  # one thread reads a shard whole, others go on with other shards
            opened = self._opened.get(shard.file)
            if opened is None or not opened.is_as_it_was():
                opened = self._checked(shard)
            with self._lock:
                self._opened[shard.file] = opened
                self._opened.move_to_end(shard.file)
                while len(self._opened) > MOST_OPEN:
                    self._opened.popitem(last=False)
        return opened

    def _checked(self, shard: Shard) -> Opened:
        """The shard, opened, and right: as it was when it was last read whole, or else read whole now."""
        path = self.folder / shard.file
        try:
            opened = Opened(path)
        except OSError as error:
            raise Refused(refusal(self.folder, shard, f"cannot be opened ({error.strerror})")) from error
        if self._right.get(shard.file) != opened.facts and not is_stamped(path, shard.sha256, opened.facts):
            fault = shard.fault(self.folder)
            if fault is None and not (opened.is_as_it_was() and Facts.of(path.stat()) == opened.facts):
                fault = "changed while it was read"
            if fault:
                raise Refused(refusal(self.folder, shard, fault))
            stamp(path, shard.sha256, opened.facts)
        self._right[shard.file] = opened.facts
        return opened

    def _refused(self, shard: Shard, place: Place, fault: str) -> Refused:
        return Damaged(refusal(self.folder, shard, f"record at byte {place.json_offset}: {fault}"))
