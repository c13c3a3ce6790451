"""How full a cache is, seen from its folder alone: whoever fills it, from whichever machine."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from configs.atomic import PARTIAL
from shards.writer import CacheWriter
from stages.cluster.tasks import Task


def prompts_made(writer: CacheWriter, tasks: Sequence[Task], record_bytes: int) -> int:
    """How many prompts of these tasks are answered for: in finished shards and, by their size, in begun ones."""
    writer.refresh()
    begun, made = begun_bytes(writer.folder), 0
    for task in tasks:
        if writer.finished(task.split, task.index, len(task.prompts)):
            made += len(task.prompts)
        else:
            made += min(len(task.prompts), begun.get(task.name, 0) // record_bytes)
    return made


def begun_bytes(cache: Path) -> dict[str, int]:
    """Name of each task whose shard is being written -> bytes that are there."""
    found: dict[str, int] = {}
    for path in (cache / "data").glob(f".*{PARTIAL}"):
        with suppress(FileNotFoundError):  # it has got its name
            found[path.name.removeprefix(".").partition(".tar.")[0]] = path.stat().st_size
    return found
