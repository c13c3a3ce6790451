"""`sollune shards verify --deep`: whether the teacher would still say what the cache says that it said."""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from shards.__main__ import DAMAGED
from shards.manifest import Manifest, find_cache
from stages.audit import Audited, Compared, ask_again, sample, teacher_of
from stages.cluster import device_of as device_of
from stages.nets.files import PARTS
from stages.nets.identity import changed_parts
from stages.nets.teacher import Teacher
from stages.upkeep.made import made

BINS = 10
WAY_OUT = "name the teacher that made the cache with --teacher, or make the cache in a new folder"


def audit(words: argparse.Namespace, device: torch.device) -> int:
    """Ask the cache's teacher again about a sample of records; the exit code is 1 when it says otherwise."""
    cache: Path = find_cache(words.folder)
    manifest = Manifest.open(cache)
    location = words.teacher or made(cache).lies_at()
    teacher = teacher_of(manifest, location, device)
    changed = list(other_parts(manifest, teacher))
    said = f"teacher {location}"
    if changed:
        print(f"sollune: {said}: {', '.join(changed)} is not what the recipe names - {WAY_OUT}", file=sys.stderr)
    else:
        print(f"{said}: the one that the recipe names")

    # A recipe that does not tell its device was made where nothing rounds to TF32, as far as anybody knows.
    rough = device.type == "cuda" or manifest.recipe.information.get("device", "cpu") != "cpu"
    audited = [
        ask_again(teacher, record, file, rough) for file, record in sample(cache, manifest, words.sample, words.seed)
    ]
    records = sum(shard.records for shard in manifest.shards)
    print(
        f"audit of {len(audited)} of {records} records, {teacher.precision} on {device}; largest errors of tolerances:"
    )
    print("\n".join(table(audited)))
    if rough:
        print("convolutions of a GPU round to TF32: a single tensor that is 1 % off may stay below such tolerances")
    bad = [one for one in audited if one.worst().share > 1]
    for one in bad:
        print(f"sollune: {told(cache, one)} - {WAY_OUT}; a broken kernel here or there does it too", file=sys.stderr)
    if bad or changed:
        return DAMAGED
    print("the teacher says the same")
    return 0


def other_parts(manifest: Manifest, teacher: Teacher) -> Iterator[str]:
    """The parts of the teacher whose files are not those that made the cache."""
    wanted: Any = manifest.recipe.identity.get("teacher")
    if not isinstance(wanted, Mapping):
        return iter(PARTS)
    missing = [part for part in PARTS if part not in wanted]
    return iter([*missing, *changed_parts(wanted, teacher.parts.folder)])


def told(cache: Path, one: Audited) -> str:
    """The line about a record that the teacher answers otherwise."""
    worst, bad = one.worst(), sum(compared.share > 1 for compared in one.compared)
    at = "" if worst.s is None else f" at s = {worst.s:.4f}"
    return (
        f"shard {cache / one.file}: record {one.key}: {worst.quantity}{at} is off by {worst.error:.1e}, tolerance "
        f"{worst.tolerance:.1e} (beyond rounding to half, in sizes of the tensor; {bad} of {len(one.compared)} are off)"
    )


def table(audited: Sequence[Audited]) -> Iterator[str]:
    """Errors against tolerances, for each bin of s."""
    every = [compared for one in audited for compared in one.compared]
    yield f"{'s':<12}{'states':>8}" + "".join(f"{name:>22}" for name in ("v_cond", "v_uncond", "features"))
    for i in range(BINS):
        here = [one for one in every if one.s is not None and min(int(one.s * BINS), BINS - 1) == i]
        states = sum(one.quantity == "v_cond" for one in here)
        columns = "".join(f"{_worst(here, name):>22}" for name in ("v_cond", "v_uncond", "features"))
        yield f"{i / BINS:.1f} to {(i + 1) / BINS:.1f}  {states:>8}{columns}"
    yield f"{'cond':<12}{len(audited):>8}{_worst(every, 'cond'):>22}"


def _worst(compared: Sequence[Compared], name: str) -> str:
    found = [one for one in compared if one.quantity.split(".")[0] == name]
    if not found:
        return "-"
    worst = max(found, key=lambda one: one.share)
    return f"{worst.error:.1e} of {worst.tolerance:.1e}"
