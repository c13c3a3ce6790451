"""Asks the teacher again what a cache says that it answered, and measures how far apart the two are.

An answer that rounds to what is stored is the same answer: only what lies beyond that is an error. What remains is the
rounding of the arithmetic, which another batch size or device does in another order.
"""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from shards.codec import max_relative_error, rms
from shards.manifest import Manifest
from shards.opened import OpenShards
from shards.record import Record
from stages.flow.bridge import Bridge
from stages.nets.components import load_components
from stages.nets.teacher import Teacher, needs_full_precision, precision_text
from stages.system.refusal import Refused

ROUNDINGS = 128
"""How many units of rounding the worst element may be off, in sizes of its tensor.

Measured on the embedded teacher: 25 in float32 (another batch size); against float32, 23 where convolutions round to
TF32 and 30 in float16. A deeper network has more of it, hence four times as many.
"""
SINGLE, HALF = 2.0**-24, 2.0**-11
"""Largest relative errors of one rounding. TF32, to which convolutions of a GPU round, has as many digits as half."""


@dataclass(frozen=True)
class Comparison:
    """One quantity at one state, or of the sentence, where s is None."""

    quantity: str
    s: float | None
    error: float
    tolerance: float

    @property
    def error_ratio(self) -> float:
        """The error in tolerances: above 1 it is too large. An error that is no number is larger than any."""
        if math.isnan(self.error):
            return math.inf
        return self.error / self.tolerance if self.tolerance else math.inf if self.error else 0.0


@dataclass(frozen=True)
class RecordAudit:
    """One record, asked again."""

    file: str
    """the shard it lies in"""
    key: str
    comparisons: Sequence[Comparison]

    def worst(self) -> Comparison:
        """What is farthest off, for its tolerance."""
        return max(self.comparisons, key=lambda one: one.error_ratio)


def sample(folder: Path, manifest: Manifest, count: int, seed: int) -> Iterator[tuple[str, Record]]:
    """So many records of a cache, all with the same chance, in the order of the shards; with each its shard's file."""
    opened = OpenShards(folder)
    places = [(shard, place) for shard in manifest.shards for place in shard.offsets]
    for number in sorted(random.Random(seed).sample(range(len(places)), min(count, len(places)))):
        shard, place = places[number]
        yield shard.file, opened.record(shard, place)


def load_recorded_teacher(manifest: Manifest, location: str, device: torch.device) -> Teacher:
    """The teacher at `location`, asked as the recipe says; raises `Refused` for a recipe that cannot be followed."""
    recipe: Any = manifest.recipe.identity
    try:
        tail, precision = recipe["render"]["tail"], recipe["dtype"]
    except (KeyError, TypeError) as error:
        raise Refused(
            f"the recipe does not tell how the teacher was asked ({error!r}) - make the cache anew"
        ) from error
    parts = load_components(location, device, torch.float32)
    bridge = Bridge(parts.schedule, tail)
    known = {precision_text(dtype, bridge): dtype for dtype in (torch.float32, torch.float16)}
    if precision not in known:
        raise Refused(f"the recipe's teacher computed in {precision!r}, known here: {', '.join(known)} - make it anew")
    return Teacher(parts, tail, known[precision])


def audit_record(teacher: Teacher, record: Record, file: str, tf32: bool) -> RecordAudit:
    """Both velocities, the features and the sentence's conditioning of one record; raises `Refused` for other shapes.

    `rough`: whether the cache was made on a GPU, or is asked again on one, whose convolutions round to TF32.
    """
    _check_shapes(teacher, record)
    draws, device = record.states, teacher.components.unet.device
    x, s, k = draws.x_t.float().to(device), draws.s.to(device), draws.k.to(device)
    cond = record.cond.to(device).expand(len(draws), -1, -1)
    answer = teacher.predict(x, s, k, cond, teacher.uncond.half())

    errors = {}
    # The velocity is a sum of a part in x and a part in the answer; at late times both are large and nearly cancel.
    of_x = teacher.bridge.velocity(x, s, k, torch.zeros_like(x))
    for name in ("v_cond", "v_uncond"):
        now = getattr(answer, name)
        errors[name] = _error(getattr(draws, name), now, rms(of_x) + rms(now - of_x))
    for block, stored in record.features.by_block.items():
        now = answer.features[block]
        errors[f"features.{block}"] = _error(stored, now, rms(now))

    lower = ~needs_full_precision(teacher.bridge, draws.k) & (
        teacher.precision != precision_text(torch.float32, teacher.bridge)
    )
    units = [HALF if tf32 or one else SINGLE for one in lower.tolist()]
    times = draws.s.tolist()
    compared = [
        Comparison(name, time, one, ROUNDINGS * unit)
        for name, error in errors.items()
        for time, one, unit in zip(times, error.tolist(), units, strict=True)
    ]
    steps = (teacher.bridge.nearest_state(s)[0] - k).abs().tolist()
    compared += [Comparison("k", time, float(apart), 0.0) for time, apart in zip(times, steps, strict=True)]
    said = teacher.encode_texts([record.text]).float()
    apart = float(_error(record.cond[None], said, rms(said)))
    return RecordAudit(file, record.key, [*compared, Comparison("cond", None, apart, ROUNDINGS * SINGLE)])


def _error(stored: Tensor, now: Tensor, size: Tensor) -> Float[Tensor, " n"]:
    return max_relative_error(stored, now.cpu(), size.cpu())


def _check_shapes(teacher: Teacher, record: Record) -> None:
    parts = teacher.components
    length, width = parts.tokenizer.model_max_length, parts.unet.config["cross_attention_dim"]
    for name, shape in (("cond", (length, width)), ("x0", parts.latent_shape)):
        found = tuple(getattr(record, name).shape)
        if found != shape:
            raise Refused(
                f"record {record.key}: {name} has shape {found}, this teacher's has {shape} - name the right one"
            )
