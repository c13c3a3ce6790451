"""Audit of a cache: the teacher predicts stored states again, and the differences are compared with tolerances.

A prediction that rounds to the stored one is equal to it. Beyond that only the rounding of the arithmetic is tolerated,
which another batch size or device does in another order.
"""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from pydantic import ValidationError
from torch import Tensor

from configs.values import PictureSize
from shards.codec import max_relative_error, rms
from shards.manifest import Manifest
from shards.opened import OpenShards
from shards.record import LANDINGS_SCHEMA, Record
from stages.cache.landings import landing_times
from stages.cache.targets import StatesConfig, draw_randomness
from stages.flow.bridge import Bridge
from stages.flow.solver import apply_guidance
from stages.nets.components import load_components
from stages.nets.teacher import Teacher, needs_full_precision, precision_text
from stages.prompts import Prompt
from stages.system.refusal import Refused
from stages.teacher_files.source import TeacherSource

AUDIT_BINS = 10
"""Bins of s in the table of errors."""
ROUNDINGS = 128
"""Largest error of an element in units of rounding, relative to the size of its tensor.

Measured on the embedded teacher: 25 in float32 (another batch size); against float32, 23 where convolutions round to
TF32 and 30 in float16. A deeper network has more of it, hence four times as many.
"""
LANDING_ROUNDINGS = 8
"""Of half precision: a landing is computed again from the stored velocities of the state before it, under guidance."""
SAME_TIME = 1e-6
"""Largest distance of a stored time from the same one in float64; the steps of a teacher are a thousand times apart."""
SINGLE, HALF = 2.0**-24, 2.0**-11
"""Largest relative errors of one rounding. TF32, to which convolutions of a GPU round, has as many digits as half."""


@dataclass(frozen=True)
class Comparison:
    """The error of one quantity at one state, or of the conditioning, where s is None."""

    quantity: str
    s: float | None
    error: float
    tolerance: float

    @property
    def error_ratio(self) -> float:
        """The error in tolerances: above 1 it is too large; infinite for an error that is no number."""
        if math.isnan(self.error):
            return math.inf
        return self.error / self.tolerance if self.tolerance else math.inf if self.error else 0.0


@dataclass(frozen=True)
class RecordAudit:
    """The comparisons of one record."""

    file: str
    """the shard it lies in"""
    key: str
    size: PictureSize
    comparisons: Sequence[Comparison]

    def worst(self) -> Comparison:
        """The largest error relative to its tolerance."""
        return max(self.comparisons, key=lambda comparison: comparison.error_ratio)


def sample(folder: Path, manifest: Manifest, count: int, seed: int) -> Iterator[tuple[str, Record]]:
    """A uniform sample of `count` records of a cache, in the order of the shards; with each its shard's file."""
    opened = OpenShards(folder, schema=manifest.schema_version, largest=max(shard.bytes for shard in manifest.shards))
    places = [(shard, place) for shard in manifest.shards for place in shard.offsets]
    for number in sorted(random.Random(seed).sample(range(len(places)), min(count, len(places)))):
        shard, place = places[number]
        yield shard.file, opened.record(shard, place)


def load_recorded_teacher(manifest: Manifest, source: TeacherSource | str, device: torch.device) -> Teacher:
    """The teacher of `source`, with the recipe's tail and precision; raises `Refused` for an unknown one."""
    recipe: Any = manifest.recipe.identity
    try:
        tail, precision = recipe["render"]["tail"], recipe["dtype"]
    except (KeyError, TypeError) as error:
        raise Refused(f"the recipe lacks a setting of the teacher ({error!r}) - make the cache anew") from error
    parts = load_components(source, device, torch.float32)
    bridge = Bridge(parts.schedule, tail)
    known = {precision_text(dtype, bridge): dtype for dtype in (torch.float32, torch.float16)}
    if precision not in known:
        raise Refused(f"the recipe's teacher computed in {precision!r}, known here: {', '.join(known)} - make it anew")
    return Teacher(parts, tail, known[precision])


def recorded_states(manifest: Manifest) -> StatesConfig | None:
    """The settings of the states of a cache with landings; None of one without, which needs none for its audit."""
    if manifest.schema_version != LANDINGS_SCHEMA:
        return None
    recipe: Any = manifest.recipe.identity
    try:
        return StatesConfig.model_validate(recipe["render"]["states"])
    except (KeyError, TypeError, ValidationError) as error:
        raise Refused(
            f"the recipe tells no states to audit landings by ({error!r:.80}) - make the cache anew"
        ) from error


def audit_record(
    teacher: Teacher, record: Record, file: str, tf32: bool, config: StatesConfig | None = None
) -> RecordAudit:
    """Both velocities, the features and the conditioning of one record; raises `Refused` for other shapes.

    `tf32`: whether the cache was made on a GPU, or is audited on one, whose convolutions round to TF32. `config`: by
    which the record was made; without it landings are left out.
    """
    _check_shapes(teacher, record)
    states, device = record.states, teacher.components.unet.device
    x, s, k = states.x_s.float().to(device), states.s.to(device), states.k.to(device)
    cond = record.cond.to(device).expand(len(states), -1, -1)
    prediction = teacher.predict(x, s, k, cond, teacher.uncond.half())

    errors = {}
    # The velocity is the sum of a part in x and one in the output; at late times both are large and nearly cancel.
    of_x = teacher.bridge.velocity(x, s, k, torch.zeros_like(x))
    for name in ("v_cond", "v_uncond"):
        now = getattr(prediction, name)
        errors[name] = _error(getattr(states, name), now, rms(of_x) + rms(now - of_x))
    for block, stored in record.features.by_block.items():
        now = prediction.features[block]
        errors[f"features.{block}"] = _error(stored, now, rms(now))

    lower = ~needs_full_precision(teacher.bridge, states.k) & (
        teacher.precision != precision_text(torch.float32, teacher.bridge)
    )
    units = [HALF if tf32 or is_lower else SINGLE for is_lower in lower.tolist()]
    times = states.s.tolist()
    comparisons = [
        Comparison(name, time, error, ROUNDINGS * unit)
        for name, by_state in errors.items()
        for time, error, unit in zip(times, by_state.tolist(), units, strict=True)
    ]
    steps = (teacher.bridge.nearest_state(s)[0] - k).abs().tolist()
    comparisons += [Comparison("k", time, float(error), 0.0) for time, error in zip(times, steps, strict=True)]
    encoded = teacher.encode_texts([record.text]).float()
    error = float(_error(record.cond[None], encoded, rms(encoded)))
    size = record.size or teacher.components.native_size
    comparisons.append(Comparison("cond", None, error, ROUNDINGS * SINGLE))
    if config is not None:
        comparisons += landing_comparisons(teacher.bridge, record, config)
    return RecordAudit(file, record.key, size, comparisons)


def landing_comparisons(bridge: Bridge, record: Record, config: StatesConfig) -> list[Comparison]:
    """The times of the landings, the noise, and each landing whose line begins at a state that is stored.

    The others could be had only by sampling again, where differences of rounding grow from step to step.
    """
    times = landing_times(config.windows).float() if config.windows else torch.empty(0)
    if record.landings is None or not torch.equal(record.landings.s, times):
        return [Comparison("landings", 1.0, math.inf, 0.0)]
    states, x = record.states, record.landings.x
    channels, height, width = record.x0.shape
    prompt = Prompt(record.text, record.class_name, record.seed)
    choice = draw_randomness(prompt, config, (channels, height, width))
    error = _error(x[:1], choice.noise[None], rms(choice.noise[None]))
    comparisons = [Comparison("landings", 1.0, float(error), ROUNDINGS * SINGLE)]
    grid = bridge.nearest_state(choice.times)[1].float()
    v_cond, v_uncond = states.v_cond.float(), states.v_uncond.float()
    for end, landing in list(zip(times.tolist(), x, strict=True))[1:]:
        before = grid[(grid >= end).sum() - 1]
        for row in (states.trajectory & ((states.s - before).abs() < SAME_TIME)).nonzero()[:1, 0].tolist():
            w, step = record.guidance_scale, float(states.s[row]) - end
            now = states.x_s[row].float() - step * apply_guidance(v_cond[row], v_uncond[row], w)
            moved = step * (w * rms(v_cond[row, None]) + abs(w - 1) * rms(v_uncond[row, None]))
            error = _error(landing[None], now[None], rms(now[None]) + moved)
            comparisons.append(Comparison("landings", end, float(error), LANDING_ROUNDINGS * HALF))
    return comparisons


def _error(stored: Tensor, now: Tensor, size: Tensor) -> Float[Tensor, " n"]:
    return max_relative_error(stored, now.cpu(), size.cpu())


def _check_shapes(teacher: Teacher, record: Record) -> None:
    parts = teacher.components
    length, width = parts.tokenizer.model_max_length, parts.unet.config["cross_attention_dim"]
    for name, shape in (("cond", (length, width)), ("x0", parts.latent_shape(record.size))):
        stored = tuple(getattr(record, name).shape)
        if stored != shape:
            raise Refused(
                f"record {record.key}: {name} has shape {stored}, this teacher's has {shape} - name the right one"
            )


def mismatch_line(cache: Path, audit: RecordAudit) -> str:
    """The line about a record whose outputs of the teacher differ."""
    worst, bad = audit.worst(), sum(compared.error_ratio > 1 for compared in audit.comparisons)
    at = "" if worst.s is None else f" at s = {worst.s:.4f}"
    return (
        f"shard {cache / audit.file}: record {audit.key}: {worst.quantity}{at} is off by {worst.error:.1e}, "
        f"tolerance {worst.tolerance:.1e} (beyond rounding to half, in sizes of the tensor; "
        f"{bad} of {len(audit.comparisons)} are off)"
    )


def error_table(audits: Sequence[RecordAudit]) -> Iterator[str]:
    """Errors against tolerances, for each bin of s, and for each size where there are several."""
    compared = [comparison for audit in audits for comparison in audit.comparisons]
    names = ["v_cond", "v_uncond", "features"]
    names += ["landings"] * any(comparison.quantity == "landings" for comparison in compared)
    yield f"{'s':<12}{'states':>8}" + "".join(f"{name:>22}" for name in names)
    for i in range(AUDIT_BINS):
        here = [one for one in compared if one.s is not None and min(int(one.s * AUDIT_BINS), AUDIT_BINS - 1) == i]
        states = sum(comparison.quantity == "v_cond" for comparison in here)
        columns = "".join(f"{_worst(here, name):>22}" for name in names)
        yield f"{i / AUDIT_BINS:.1f} to {(i + 1) / AUDIT_BINS:.1f}  {states:>8}{columns}"
    yield f"{'cond':<12}{len(audits):>8}{_worst(compared, 'cond'):>22}"
    sizes = sorted({audit.size for audit in audits})
    for size in sizes if len(sizes) > 1 else ():
        here = [comparison for audit in audits if audit.size == size for comparison in audit.comparisons]
        states = sum(comparison.quantity == "v_cond" for comparison in here)
        yield f"{size!s:<12}{states:>8}" + "".join(f"{_worst(here, name):>22}" for name in names)


def _worst(comparisons: Sequence[Comparison], name: str) -> str:
    of_name = [comparison for comparison in comparisons if comparison.quantity.split(".")[0] == name]
    if not of_name:
        return "-"
    worst = max(of_name, key=lambda comparison: comparison.error_ratio)
    return f"{worst.error:.1e} of {worst.tolerance:.1e}"
