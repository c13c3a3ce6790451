"""The run that a conversion starts from: where its student, its teacher, its prompts and its sizes are."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from configs.values import PictureSize
from shards.manifest import MANIFEST_FILE, Manifest
from stages.cache.sizes import SizeShare
from stages.cache.targets import training_shares
from stages.convert.config import Config
from stages.convert.mix import mixed_teacher
from stages.nets.run_folder import COMPLETE_MARK, SavedRun, cache_folder, is_run, open_run
from stages.nets.student_shape import refuse_pruned
from stages.sampling.few_steps import refuse_few_steps
from stages.system.refusal import Refused
from stages.teacher_files.recorded import find_source
from stages.teacher_files.source import TeacherMove, TeacherSource

DISTILL = "distill"
"""The folder of a distillation, and of a conversion, in its run folder."""
MOVE_OPTION = "--base-teacher"


def open_base(folder: Path, teacher: TeacherMove | None = None) -> SavedRun:
    """The run in `folder` or in its `distill`; `teacher` is where its teacher lies now, if it moved.

    Raises `Refused` where there is none, none with a checkpoint, and for a student that predicts no velocity.
    """
    inner = folder / DISTILL
    saved = open_run(inner if is_run(inner) and not is_run(folder) else folder)
    if saved.origin.target != "velocity":
        raise Refused(
            f"base: {saved.folder}: its student predicts {saved.origin.target}, and only one that predicts velocity "
            "can be converted from - name another base run"
        )
    refuse_few_steps(saved, "a conversion")
    refuse_pruned(saved.folder, saved.origin.prune, "a conversion")
    if not (saved.folder / COMPLETE_MARK).is_file():
        print(f"base: {saved.folder}: has not ended, its checkpoint after {saved.samples} samples is taken")
    return replace(saved, origin=saved.origin.with_teacher(teacher))


def base_sizes(
    saved: SavedRun, learnt: Sequence[PictureSize], native: PictureSize, chosen: Sequence[SizeShare] = ()
) -> tuple[SizeShare, ...]:
    """The picture sizes of the polish with their shares: those chosen, or else the ones that the base has learnt.

    Their shares are those of its cache, and equal where that is gone. None for the fine-tune's size `native` alone.
    Raises `Refused` for a chosen size that the base has not learnt.
    """
    for one in chosen:
        if one.size not in learnt:
            raise Refused(
                f"render.sizes: {one.size}: the base {saved.folder} has not learnt it - choose of "
                f"{', '.join(map(str, learnt))}"
            )
    if chosen or tuple(learnt) == (native,):
        return tuple(chosen)
    cache = cache_folder(saved.folder)
    known = training_shares(Manifest.open(cache)) if (cache / MANIFEST_FILE).is_file() else ()
    shares = {one.size: one.share for one in known}
    return tuple(SizeShare(size=size, share=shares.get(size, 1 / len(learnt))) for size in learnt)


def fine_tune_source(config: Config, saved: SavedRun) -> TeacherSource:
    """The model that is converted, or the mix of models, which starts from the base's teacher."""
    if config.teacher is not None:
        return config.teacher
    return mixed_teacher(find_source(saved.origin.teacher_sources(), MOVE_OPTION), config.mix)
