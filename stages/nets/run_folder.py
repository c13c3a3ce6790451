"""A run folder of `distill` or `finetune-classes` for its readers: its teacher, its tail policy, its weights."""

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from configs.values import PictureSize
from shards.manifest import Manifest, Recipe
from stages.flow.bridge import TailPolicy
from stages.nets.components import Components, load_components
from stages.nets.guidance import embed_guidance
from stages.nets.lora import LoraConfig, add_adapters, load_adapters, merge_adapters
from stages.nets.student import Student, Target, make_vp_bridge
from stages.nets.student_shape import LDM_FACT, Prune, fits_ldm, prune_unet, pruned_config
from stages.system.atomic import atomic_path, atomic_write
from stages.system.refusal import Refused, in_one_line
from stages.system.storage.locations import show_locations
from stages.teacher_files.recorded import MOVE_OPTION, absolute_place, changed_parts, find_teacher, recorded_sources
from stages.teacher_files.source import TeacherMove, TeacherSource

ORIGIN_FILE, COMPLETE_MARK = "origin.json", "COMPLETE"
CHECKPOINTS_FOLDER, WEIGHTS_FILE = "checkpoints", "ema.safetensors"
FAST_FOLDER = "fast"
"""Holds the runs of students of few steps, by their windows."""
BASE_PLACE = "folder"
"""The entry of `Origin.base` that means something on one machine alone."""
BASE_FILE = "base.safetensors"
"""The weights beside which adapters were trained, in the folder of a run whose checkpoints hold those alone."""


@dataclass(frozen=True)
class Origin:
    """Where a student comes from; stored in the run folder, so that the run outlives its cache."""

    teacher: str
    """A diffusers folder or a hub repository."""
    teacher_sha256: Mapping[str, str]
    """What the teacher was when the cache was made, by component."""
    tail: TailPolicy
    recipe_sha256: str
    """Of its training cache; empty for a student that was imported."""
    target: Target = "velocity"
    """What the student's network predicts."""
    lora: Mapping[str, Any] | None = None
    """The `LoraConfig` of a run whose checkpoints hold adapters alone."""
    teacher_path: str | None = None
    """The absolute path of a teacher that is a folder or a file of this machine."""
    source: Mapping[str, Any] | None = None
    """The `TeacherSource` with absolute paths; None in runs of before, whose teacher was its location alone."""
    sizes: tuple[str, ...] = ()
    """The picture sizes that its training cache holds, that of the largest share first; empty in runs of before."""
    base: Mapping[str, Any] | None = None
    """Of a converted fine-tune: the run it was started from, its weights, and the start; None for any other run."""
    windows: int | None = None
    """The steps that the student samples in, with the guidance scale as its input; None for any other run."""
    guidance_range: tuple[float, float] | None = None
    """The least and the greatest guidance scale that such a student learnt; None for any other run."""
    prune: Prune = "none"
    """The layers of its teacher that the student was made without."""
    scratch: bool = False
    """Whether the student began with random weights in place of its teacher's."""

    def __post_init__(self) -> None:
        if (self.windows is None) != (self.guidance_range is None) or (self.windows is not None and self.windows < 1):
            raise ValueError(f"windows {self.windows} and guidance_range {self.guidance_range}: both or none")

    @classmethod
    def from_manifest(
        cls, manifest: Manifest, teacher: TeacherMove | str | None = None, target: Target = "velocity"
    ) -> "Origin":
        """The origin of a student of this cache; `teacher` is where the teacher lies now, if it moved."""
        # A small share may have drawn no prompt of the training split, and then the student did not learn the size.
        return cls.from_recipe(manifest.recipe, {str(size) for size in manifest.sizes_of("train")}, teacher, target)

    @classmethod
    def from_recipe(
        cls,
        recipe: Recipe,
        present: Collection[str],
        teacher: TeacherMove | str | None = None,
        target: Target = "velocity",
    ) -> "Origin":
        """The same of a cache with this recipe, whose training split has pictures of the sizes `present`."""
        digests: Any = recipe.identity["teacher"]
        render: Any = recipe.identity["render"]
        location = str(recipe.information["teacher_location"])
        path = recipe.information.get("teacher_path")
        source: Any = recipe.information.get("teacher_source")
        shares: Any = render.get("sizes") or ()
        sizes = tuple(size for one in sorted(shares, key=lambda one: -one["share"]) if (size := one["size"]) in present)
        place, sha256 = str(path) if path else None, recipe.fingerprint()
        origin = cls(location, digests, render["tail"], sha256, target, teacher_path=place, source=source, sizes=sizes)
        return origin.with_teacher(teacher)

    @classmethod
    def open(cls, folder: Path) -> "Origin":
        """The origin of a run; raises `Refused` when its file is broken."""
        path = folder / ORIGIN_FILE
        try:
            origin = cls(**json.loads(path.read_text(encoding="utf-8")))
            origin = replace(origin, sizes=tuple(str(PictureSize.parse(size)) for size in origin.sizes))
            origin = TypeAdapter(cls).validate_python(asdict(origin))
            if origin.lora is not None:
                LoraConfig.model_validate(origin.lora)
            return origin
        except (OSError, ValueError, TypeError, RecursionError) as error:
            reason = in_one_line(error)
            raise Refused(f"{path}: cannot be read ({reason}) - start the run's command again, it writes it") from error

    def with_teacher(self, teacher: TeacherMove | str | None) -> "Origin":
        """The same with the teacher's files where they lie now, if anything is given."""
        if teacher is None:
            return self
        if isinstance(teacher, str):
            teacher = TeacherMove(location=teacher)
        source = teacher.over(self.teacher_sources()[0])
        if teacher.location is None:
            return replace(self, source=show_locations(source.absolute().model_dump(mode="json")))
        return self.with_source(source)

    def with_source(self, source: TeacherSource) -> "Origin":
        """The same with this teacher."""
        content = show_locations(source.absolute().model_dump(mode="json"))
        place = show_locations(source.location)
        return replace(self, teacher=place, teacher_path=absolute_place(source.location), source=content)

    def teacher_sources(self) -> tuple[TeacherSource, ...]:
        """Where to look for the teacher: its location as named, then its absolute path of then."""
        return recorded_sources(self.teacher, self.teacher_path, self.source)

    def with_lora(self, lora: LoraConfig | None) -> "Origin":
        """The origin of a run that continues from this one, with adapters or all weights."""
        return replace(self, lora=lora.model_dump(mode="json") if lora else None)

    def learnt_sizes(self, native: PictureSize) -> tuple[PictureSize, ...]:
        """The picture sizes that the student learnt, the most frequent first; `native` is its teacher's own."""
        return tuple(map(PictureSize.parse, self.sizes)) or (native,)

    def main_size(self, native: PictureSize) -> PictureSize:
        """The size at which a student is measured that learnt several: the teacher's own, or else the most frequent."""
        sizes = self.learnt_sizes(native)
        return native if native in sizes else sizes[0]

    def export_facts(self, components: Components, samples: int) -> dict[str, Any]:
        """The facts that an export stores about its student."""
        recipe = {"recipe_sha256": self.recipe_sha256} if self.recipe_sha256 else {}
        lora = {"lora": self.lora} if self.lora else {}
        native = components.native_size
        sizes = {"native_size": str(native), "sizes": [str(size) for size in self.learnt_sizes(native)]}
        base = {key: value for key, value in (self.base or {}).items() if key != BASE_PLACE}
        teacher = {**components.name_facts, **components.change_facts, **({"converted_from": base} if base else {})}
        fast = {"windows": self.windows, "guidance_range": self.guidance_range} if self.windows else {}
        shape: dict[str, Any] = {"scratch": True} if self.scratch else {}
        if self.prune != "none":
            is_ldm = fits_ldm(pruned_config(components.unet.config, self.prune))
            shape |= {"prune": self.prune, LDM_FACT: is_ldm}
        return {**teacher, "tail": self.tail, **recipe, **lora, "samples": samples, **sizes, **fast, **shape}

    def save(self, folder: Path) -> None:
        """Write it into a run folder."""
        atomic_write(folder / ORIGIN_FILE, json.dumps(asdict(self), indent=1, sort_keys=True) + "\n")


@dataclass(frozen=True)
class SavedRun:
    """A run folder and one of its checkpoints, written after `samples` training samples."""

    folder: Path
    origin: Origin
    weights: Path
    """The averaged weights of the checkpoint."""
    samples: int


def is_run(folder: Path) -> bool:
    """Whether `folder` is a run, finished or not."""
    return (folder / ORIGIN_FILE).is_file()


def cache_folder(run_folder: Path) -> Path:
    """The cache that a run was distilled from, beside the run folder, or beside that of all numbers of windows."""
    is_fast = run_folder.parent.name == FAST_FOLDER and run_folder.name.isdecimal()
    return (run_folder.parents[1] if is_fast else run_folder.parent) / "cache"


def open_run(folder: Path, samples: int | None = None) -> SavedRun:
    """The run with the checkpoint at `samples`, or its final one, or else its newest; raises `Refused` for none."""
    if not is_run(folder):
        raise Refused(
            f"{folder}: no run lies here ({ORIGIN_FILE} is missing) - name a folder such as runs/tiny/distill"
        )
    weights = _checkpoint_weights(folder)
    if not weights:
        raise Refused(f"{folder}: no checkpoint yet (checkpoints/<samples>/{WEIGHTS_FILE}) - let the run write one")
    chosen = _final_checkpoint(folder, weights) if samples is None else samples
    if chosen not in weights:
        known = ", ".join(map(str, sorted(weights)))
        raise Refused(f"{folder}: no checkpoint at {samples} samples - there are {known}")
    return SavedRun(folder, Origin.open(folder), weights[chosen], chosen)


def newest_checkpoint(folder: Path) -> int:
    """The training samples of a run's newest checkpoint; 0 where it has none."""
    return max(_checkpoint_weights(folder), default=0)


def load_run_teacher(origin: Origin, device: torch.device, dtype: torch.dtype, option: str = MOVE_OPTION) -> Components:
    """The teacher of a run; raises `Refused` when it is missing or no longer the one that made the cache.

    `option` says where a teacher lies that moved.
    """
    files = find_teacher(origin.teacher_sources(), option)
    if changed := changed_parts(origin.teacher_sha256, files):
        place = files.location if files.is_composed else files.folder
        raise Refused(
            f"teacher: {place}: {', '.join(changed)} changed since the cache was made - "
            f"put the same model there, say where it lies now with {option}, or make the cache again"
        )
    return load_components(files, device, dtype)


def load_student(run: SavedRun, components: Components) -> Student:
    """The checkpoint's student, frozen, on the teacher's device, its adapters merged if it has any.

    Raises `Refused` for a foreign or broken file.
    """
    return merge_adapters(load_with_adapters(run, components)).eval()


def load_with_adapters(run: SavedRun, components: Components) -> Student:
    """The same with its adapters, if it has any, not merged."""
    origin, base = run.origin, run.folder / BASE_FILE
    unet = components.unet if origin.windows is None else embed_guidance(components.unet)
    student = Student.from_teacher(
        prune_unet(unet, origin.prune), make_vp_bridge(origin.target, components.schedule, origin.tail)
    )
    if origin.lora is not None:
        _load_weights(base, student, _load_unet, "start the run's command again, it writes it")
        student = add_adapters(student, LoraConfig.model_validate(origin.lora))
    load = _load_unet if origin.lora is None else load_adapters
    _load_weights(run.weights, student, load, "choose another checkpoint")
    return student


def save_base(folder: Path, origin: Origin, student: Student) -> None:
    """Write the student's weights, beside which adapters are trained, into the run folder; nothing without adapters.

    Raises `Refused` as `refuse_other_base` does.
    """
    refuse_other_base(folder, origin, student)
    if origin.lora is not None:
        with atomic_path(folder / BASE_FILE) as temporary:
            save_file(_cpu_state_dict(student), temporary)


def refuse_other_base(folder: Path, origin: Origin, student: Student) -> None:
    """Raise `Refused` when the folder holds checkpoints of other adapters or of another base model."""
    if not (_checkpoint_weights(folder) and is_run(folder)):
        return
    if (then := Origin.open(folder).lora) != origin.lora:
        raise Refused(f"{folder}: was begun with lora = {then}, not {origin.lora} - take another run folder, or that")
    if origin.lora is None or not (stored := _load_or_empty(folder / BASE_FILE)):
        return
    weights = _cpu_state_dict(student)
    if stored.keys() != weights.keys() or any(not torch.equal(stored[name], weights[name]) for name in weights):
        raise Refused(f"{folder / BASE_FILE}: is not the model that this run goes on from - take another run folder")


def _cpu_state_dict(student: Student) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in student.state_dict().items()}


def _load_or_empty(file: Path) -> dict[str, Tensor]:
    """The tensors of a file; none when it is missing or broken and has to be written again."""
    try:
        return load_file(file)
    except (SafetensorError, OSError):
        return {}


def _load_unet(student: Student, weights: Mapping[str, Tensor]) -> None:
    student.unet.load_state_dict({name.removeprefix("unet."): value for name, value in weights.items()})


def _load_weights(
    file: Path, student: Student, load: Callable[[Student, Mapping[str, Tensor]], None], hint: str
) -> None:
    try:
        load(student, load_file(file))
    except (SafetensorError, OSError, RuntimeError) as error:
        raise Refused(f"{file}: not the student's weights ({in_one_line(error)}) - {hint}") from error


def _final_checkpoint(folder: Path, checkpoints: Mapping[int, Path]) -> int:
    """The checkpoint that a finished run chose, which need not be its newest; else the newest."""
    mark = folder / COMPLETE_MARK
    samples = mark.read_text(encoding="utf-8", errors="replace").strip() if mark.is_file() else ""
    return int(samples) if samples.isdecimal() and int(samples) in checkpoints else max(checkpoints)


def _checkpoint_weights(folder: Path) -> dict[int, Path]:
    """Training samples -> averaged weights."""
    files = (folder / CHECKPOINTS_FOLDER).glob(f"[0-9]*/{WEIGHTS_FILE}")
    return {int(path.parent.name): path for path in files if path.parent.name.isdecimal()}
