"""What the parts of a GPU run share: device, teacher, the small cache to train from, and settings of the commands."""

import gc
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from diffusers import UNet2DConditionModel

from benchmarks.full_size import EMBEDDED, make_full_size
from benchmarks.gpu_report import Budget, RecordFigures
from configs.load import load
from stages import cache_teacher, distill
from stages.nets.components import Components
from stages.nets.features import copy_without_hooks
from stages.nets.measured_teacher import MeasuredTeacher, load_measured_teacher
from stages.nets.teacher import Teacher
from stages.system.device import device_of
from stages.system.refusal import Refused
from stages.teacher_files.source import TeacherSource
from stages.train.runtime import Precision, Runtime

CARDS = Path("configs/cards")
OVERLAY_GIB = {"80gb": 75, "40gb": 37, "24gb": 0}
"""Memory of a card from which an overlay is for it."""
DRY_BATCH = 4
DAVID_FIT = ("--david.fit.steps", "1", "--david.fit.batch-size", "8", "--david.fit.bins", "20")
"""Its fit is no part of a step, and its quality changes no time."""
FULL_CACHE = ("--count", "24", "--validation-count", "8", "--render.batch-size", "8", "--render.records-per-shard", "8")
DRY_CACHE = (
    *("--count", "6", "--validation-count", "2", "--render.batch-size", "2", "--render.records-per-shard", "2"),
    *("--render.states.steps", "4"),
)


@dataclass(frozen=True)
class Settings:
    """What a process needs to open its world."""

    dry: bool
    folder: str
    """for everything that is written; the parent process removes it"""
    device: str = "auto"

    def open(self) -> "World":
        """The world of this process; nothing is loaded yet."""
        return World(self)


class World:
    """Loads each thing when a part first needs it, and keeps what later parts need."""

    def __init__(self, settings: Settings) -> None:
        self.dry, self.folder = settings.dry, Path(settings.folder)
        self.device = device_of(settings.device)
        self.base = Path("configs/tiny.yaml" if self.dry else "configs/sd15.yaml")

    def make_teacher_folder(self) -> Path:
        """The teacher's folder: the embedded one, or one of SD1.5's size, whose weights are drawn on the device."""
        if self.dry:
            return EMBEDDED
        with torch.device(self.device):
            return make_full_size(self.folder / "teacher")

    @cached_property
    def opened(self) -> MeasuredTeacher:
        """The teacher as `sollune cache-teacher` opens it."""
        return load_measured_teacher(TeacherSource(location=str(self.make_teacher_folder())), self.device)

    @cached_property
    def teacher(self) -> Teacher:
        """The teacher of training, in fp32."""
        return Teacher(self.opened.components, "hold")

    def fresh_teacher(self) -> MeasuredTeacher:
        """The same with a copy of the UNet: every `Teacher` leaves hooks in its UNet, and compiles it."""
        parts = self.opened.components
        copied = copy_without_hooks(parts.unet).eval().requires_grad_(False)
        return replace(self.opened, components=replace(parts, unet=copied))

    def cache_config(self, name: str, options: Sequence[str]) -> cache_teacher.Config:
        """The settings of `cache-teacher` for a run folder of this name."""
        arguments = ["--run", str(self.folder / name), "--device", str(self.device), *options]
        return load(cache_teacher.Config, "cache_teacher", [self.base], arguments)

    @property
    def small_cache_options(self) -> tuple[str, ...]:
        """Those of the cache that is trained from."""
        return DRY_CACHE if self.dry else (*FULL_CACHE, "--dtype", "float16")

    def distill_config(self, overlay: str, options: Sequence[str] = ()) -> distill.Config:
        """The settings of `distill` under a card's overlay, on the small cache."""
        dry = ("--train.batch-size", str(DRY_BATCH)) if self.dry else ()
        arguments = ["--run", str(self.folder / "small"), "--device", str(self.device), *dry, *DAVID_FIT, *options]
        return load(distill.Config, "distill", [self.base, CARDS / f"{overlay}.yaml"], arguments)

    @property
    def cache(self) -> Path:
        """The cache to train from; raises `Refused` where an earlier part did not make it whole."""
        folder = self.folder / "small" / "cache"
        if not (folder / "COMPLETE").exists():
            raise Refused("no cache to train from: the part that makes it did not end well")
        return folder

    @property
    def overlay(self) -> str:
        """The overlay that fits this card."""
        if self.device.type != "cuda":
            return "80gb"
        gib = torch.cuda.get_device_properties(self.device).total_memory / 2**30
        return next(name for name, least in OVERLAY_GIB.items() if gib >= least)

    def runtime(self, precision: Precision) -> Runtime:
        """A runtime as at the start of a process: accelerate keeps one precision for as long as a process lives."""
        AcceleratorState._reset_state(reset_partial_state=True)
        return Runtime(self.device, precision)

    def fresh_folder(self, name: str, kept: str | None = None) -> Path:
        """An empty place below this run's folder; all that an earlier part left there goes, but for `kept`."""
        folder = self.folder / name
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.name == kept:
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return folder

    def release(self) -> None:
        """Give the device's memory of finished work back, so that the next part has all of it."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    @property
    def embedded_components(self) -> Components:
        """The embedded teacher on this device, for what needs whole checkpoints."""
        return load_measured_teacher(TeacherSource(location=str(EMBEDDED)), self.device).components


def new_unet(unet: UNet2DConditionModel, device: torch.device) -> UNet2DConditionModel:
    """A UNet of the same architecture with random weights, on a device."""
    with torch.device(device):
        return UNet2DConditionModel.from_config(unet.config)


def load_teacher(world: World, budget: Budget, record: RecordFigures) -> None:
    """Make and load the teacher; the later parts share it."""
    began = time.perf_counter()
    folder = world.make_teacher_folder()
    record({"seconds_to_make": time.perf_counter() - began})
    budget.check("loading the teacher")
    began = time.perf_counter()
    parts = world.opened.components
    record(
        {
            "seconds_to_load": time.perf_counter() - began,
            "parameters": {
                name: sum(p.numel() for p in getattr(parts, name).parameters())
                for name in ("unet", "vae", "text_encoder")
            },
            "bytes_on_disk": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
            "prediction": world.opened.used.prediction_type,
        }
    )
