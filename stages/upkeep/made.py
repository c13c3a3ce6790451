"""How a cache was made, as the configuration beside it says: where its teacher lies, and what makes it again."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from configs.load import load
from configs.refusal import Refused
from shards.manifest import NAME, Manifest


@dataclass(frozen=True)
class Made:
    """A cache's origin."""

    places: Sequence[str]
    """where its teacher lies: a diffusers folder or hub id, and where that was on the machine that named it"""
    again: Callable[[], None]
    """makes what is missing"""

    def lies_at(self) -> str:
        """Where the teacher is; raises `Refused` when it is nowhere."""
        from stages.nets.files import find  # here, because it takes seconds and most commands do without

        return find(self.places)[0]


def made(cache: Path, teacher: str | None = None) -> Made:
    """The origin of a cache; `teacher` says where the teacher lies now, if it moved.

    Raises `Refused` when no story's configuration lies beside it.
    """
    told, classes = cache.parent / "cache.yaml", cache.parent / "config.yaml"
    if told.is_file():
        return _of_story_one(cache, told, teacher)
    if classes.is_file():
        return _of_story_three(cache, classes, teacher)
    raise Refused(f"{told}: not there, so nothing says how {cache} was made - run its make target, or fetch it again")


def _of_story_one(cache: Path, file: Path, teacher: str | None) -> Made:
    from stages import cache_teacher  # here, because it takes seconds and most commands do without

    words = ["--run", str(cache.parent), *(["--teacher", teacher] if teacher else [])]
    config = load(cache_teacher.Config, "cache_teacher", [file], words)
    path = None if teacher or not (cache / NAME).exists() else _path_in(cache)
    if path and not Path(config.teacher).is_dir() and Path(path).is_dir():
        config = config.model_copy(update={"teacher": path})
    return Made([config.teacher, *([path] if path else [])], partial(cache_teacher.run, config))


def _path_in(cache: Path) -> str | None:
    """Where the teacher lay on the machine that made the cache, as its manifest says; a broken one says nothing."""
    try:
        path = Manifest.open(cache).recipe.information.get("teacher_path")
    except Refused:
        return None
    return path if isinstance(path, str) else None


def _of_story_three(cache: Path, file: Path, teacher: str | None) -> Made:
    """The class pictures of a run; the class file that they were painted for lies beside them."""
    from stages import finetune_classes
    from stages.nets.saved import Origin

    words = ["--run", str(cache.parent.parent), "--classes", str(cache.parent / "classes.yaml")]
    config = load(finetune_classes.Config, "finetune_classes", [file], words)
    origin = Origin.open(cache.parent).at(teacher)
    return Made(origin.places(), partial(finetune_classes.repaint, config, origin))
