"""The gate: rejects pictures of the classes that do not show their prompt, or are near-duplicates of another."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import mkdtemp
from typing import get_args

import torch
from jaxtyping import Float
from pydantic import Field, JsonValue
from torch import Tensor
from tqdm import tqdm

from configs.values import Location, Strict
from shards.reader import Reader
from stages.classes.ledger import LEDGER_FILE, Ledger, Picture, PictureSource
from stages.classes.pictures import PicturePlan, PicturesConfig
from stages.evaluate.clip import ClipScorer
from stages.evaluate.metrics import Scorer
from stages.nets.teacher import Teacher
from stages.sampling.grids import SHEET_FILE, save_contact_sheet
from stages.system.refusal import Refused

COSINE_TOLERANCE = 1e-6
"""Rounding error of the cosine of a latent with itself."""
SCORING_BATCH_SIZE = 8
"""Pictures that are decoded and scored together."""


class GateConfig(Strict):
    """Which pictures of the classes are set aside."""

    score: float | None = Field(
        0.2,
        description="least class score: the lowest of the scorer's values (1 right, 0 wrong), or CLIP's cosine; "
        "none takes all; photographs are not scored",
    )
    duplicate: float | None = Field(
        0.99, gt=0, le=1, description="least cosine of two latents of a class that sets the later aside; none: never"
    )
    clip: Location | None = Field(
        None, description="folder or hub id of a CLIP model that replaces the scorer; none: the scorer"
    )


def select_scorer(config: GateConfig, scorer: Scorer | None, device: torch.device) -> Scorer | None:
    """CLIP if the gate names a model, else the scorer; raises `Refused` where CLIP cannot be loaded."""
    return ClipScorer(config.clip, device) if config.clip else scorer


def apply_gate(
    folder: Path,
    plan: PicturePlan,
    teacher: Teacher,
    scorer: Scorer | None,
    config: GateConfig,
    pictures_config: PicturesConfig,
    check_ledger: Callable[[Ledger], object],
) -> Ledger:
    """Write pictures.json and the sheet of rejected pictures into `folder`, RUN/classes; no picture is deleted.

    A ledger of the same pictures and settings is kept. Raises `Refused` naming a class that has no picture left, and
    whatever `check_ledger` raises; then the files of an earlier gate stay as they were.
    """
    reader = Reader(folder / "cache")
    judged_by = _gate_identity(reader, scorer, config, pictures_config)
    keys = [head.key for head in reader.headers()]
    if existing := _matching_ledger(folder, judged_by, keys):
        check_ledger(existing)
        return existing
    x0 = [record.x0 for record in reader.records()]
    score = _scores(keys, x0, plan, teacher, scorer if config.score is not None else None)
    parts = teacher.components
    sizes = {key: parts.latents.size_of_latents(*latents.shape[1:]) for key, latents in zip(keys, x0, strict=True)}
    others = {key: str(size) for key, size in sizes.items() if size != parts.native_size}
    if scorer is not None and config.score is not None:
        for line in _unscored_lines(keys, score, plan, others):
            print(line)
    reasons = _rejection_reasons(keys, x0, score, plan, config)
    pictures: dict[str, Picture] = {}
    for key in keys:
        source, reason = plan.source_at(int(key)), reasons.get(key, "")
        target = pictures_config.target_for(source)
        name, size = plan.class_of[int(key)], others.get(key)
        pictures[key] = Picture(name, source, target, kept=not reason, reason=reason, size=size)
    ledger = Ledger(judged_by, pictures)
    if message := _empty_class(ledger, plan):
        # The sheet of an earlier gate belongs to the run that used its ledger.
        sheet = Path(mkdtemp(prefix="sollune-") if (folder / LEDGER_FILE).exists() else folder) / SHEET_FILE
        _save_rejected_sheet(ledger, reader, teacher, sheet)
        raise Refused(f"{message} - look at {sheet}, then lower gate.score or ask for other pictures")
    check_ledger(ledger)
    _save_rejected_sheet(ledger, reader, teacher, folder / SHEET_FILE)
    ledger.save(folder)
    return ledger


def summary_line(ledger: Ledger) -> str:
    """What was set aside, in one line."""
    rejected = ledger.rejected_pictures().values()
    by_class = ", ".join(f"{name} {count}" for name, count in Counter(one.class_name for one in rejected).items())
    where = f" ({by_class})" if by_class else ""
    return f"set aside: {len(rejected)} of {len(ledger.pictures)} pictures, {_count_reasons(rejected)}{where}"


def _empty_class(ledger: Ledger, plan: PicturePlan) -> str | None:
    """A message about the first class without a picture, if there is one."""
    kept = {one.class_name for one in ledger.pictures.values() if one.kept}
    for name, planned in Counter(plan.class_of).items():
        if name not in kept:
            rejected = [one for one in ledger.rejected_pictures().values() if one.class_name == name]
            reasons = f"{_count_reasons(rejected)}, {planned - len(rejected)} not made"
            return f"class {name!r}: none of its {planned} pictures is left ({reasons})"
    return None


def _count_reasons(rejected: Iterable[Picture]) -> str:
    reasons = Counter(one.reason.split()[0] for one in rejected)
    return f"{reasons['score']} by their score, {reasons['like']} as near-duplicates"


def _gate_identity(
    reader: Reader, scorer: Scorer | None, config: GateConfig, pictures_config: PicturesConfig
) -> dict[str, JsonValue]:
    name = getattr(scorer, "__module__", "") + "." + getattr(scorer, "__qualname__", type(scorer).__qualname__)
    return {
        "recipe": reader.manifest.recipe.fingerprint(),
        "scorer": name if scorer else None,
        "gate": config.model_dump(mode="json"),
        "targets": {source: pictures_config.target_for(source) for source in get_args(PictureSource)},
    }


def _matching_ledger(folder: Path, judged_by: dict[str, JsonValue], keys: Sequence[str]) -> Ledger | None:
    """The ledger in the folder, if it is of these very pictures and settings; None where it is missing or broken."""
    try:
        ledger = Ledger.open(folder)
    except Refused:
        return None
    return ledger if (dict(ledger.judged_by), list(ledger.pictures)) == (judged_by, list(keys)) else None


def _scores(
    keys: Sequence[str],
    x0: Sequence[Float[Tensor, "c h w"]],
    plan: PicturePlan,
    teacher: Teacher,
    scorer: Scorer | None,
) -> Float[Tensor, " n"]:
    """The lowest score of each picture; nan without a scorer, and where the prompt names no attribute."""
    score = torch.full([len(keys)], torch.nan)
    if scorer is None:
        return score
    # The user chose the photographs, and their class may be a word that no scorer knows.
    rows = [row for row, key in enumerate(keys) if plan.source_at(int(key)) != "photograph"]
    batches = [
        of_shape[first : first + SCORING_BATCH_SIZE]
        for of_shape in _rows_by_shape(rows, x0)
        for first in range(0, len(of_shape), SCORING_BATCH_SIZE)
    ]
    for batch in tqdm(batches, desc="gate", disable=None):
        latents = torch.stack([x0[row] for row in batch]).float()
        pictures = teacher.decode_latents(latents.to(teacher.components.unet.device))
        score[batch] = lowest_scores(scorer([plan.prompts[int(keys[row])].text for row in batch], pictures))
    return score


def _unscored_lines(
    keys: Sequence[str], score: Float[Tensor, " n"], plan: PicturePlan, other_sizes: Mapping[str, str]
) -> list[str]:
    """A line for each size other than the model's own of which the scorer judged no picture, so that all are kept."""
    judged: dict[str, list[bool]] = {}
    for key, value in zip(keys, score.tolist(), strict=True):
        if key in other_sizes and plan.source_at(int(key)) != "photograph":
            judged.setdefault(other_sizes[key], []).append(not math.isnan(value))
    return [
        f"gate: {len(values)} pictures of {size} are kept unjudged, the scorer gives no value to that size"
        for size, values in judged.items()
        if not any(values)
    ]


def _rows_by_shape(rows: Iterable[int], x0: Sequence[Float[Tensor, "c h w"]]) -> list[list[int]]:
    """The rows of pictures of one size together, in order."""
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for row in rows:
        by_shape.setdefault(tuple(x0[row].shape), []).append(row)
    return list(by_shape.values())


def lowest_scores(scores: Mapping[str, Float[Tensor, " b"]]) -> Float[Tensor, " b"]:
    """The lowest score of each picture, nan where all are nan: 1 means that every attribute of the prompt is shown."""
    values = torch.stack([value.float().cpu() for value in scores.values()])
    lowest = values.nan_to_num(nan=torch.inf).amin(0)
    return lowest.masked_fill(values.isnan().all(0), torch.nan)


def _rejection_reasons(
    keys: Sequence[str],
    x0: Sequence[Float[Tensor, "c h w"]],
    score: Tensor,
    plan: PicturePlan,
    config: GateConfig,
) -> dict[str, str]:
    """Key -> reason, of the rejected pictures: by score, and of the others the near-duplicates in a class and size."""
    reasons: dict[str, str] = {}
    if config.score is not None:
        for row in (score < config.score).nonzero().flatten().tolist():
            reasons[keys[row]] = f"score {float(score[row]):.3g} is below {config.score:g}"
    by_class: dict[str, list[int]] = {}
    for row, key in enumerate(keys):
        if key not in reasons:
            by_class.setdefault(plan.class_of[int(key)], []).append(row)
    if config.duplicate is not None:
        for rows in (alike for of_class in by_class.values() for alike in _rows_by_shape(of_class, x0)):
            for later, earlier, cosine in find_duplicates(torch.stack([x0[row] for row in rows]), config.duplicate):
                reasons[keys[rows[later]]] = f"like {keys[rows[earlier]]} ({cosine:.3f})"
    return reasons


def find_duplicates(x0: Float[Tensor, "n c h w"], threshold: float) -> Iterator[tuple[int, int, float]]:
    """(later, earlier, cosine) of each picture that is like an earlier one which is no duplicate itself.

    The cosine of the latents themselves: a latent is a small picture with channels that are near zero on average.
    """
    flat = torch.nn.functional.normalize(x0.float().flatten(1), dim=1)
    cosine, stays = flat @ flat.T, torch.zeros(len(flat), dtype=torch.bool)
    for row in range(len(flat)):
        to_others = cosine[row].masked_fill(~stays, -1)
        nearest = int(to_others.argmax())
        if stays.any() and to_others[nearest] >= threshold - COSINE_TOLERANCE:
            yield row, nearest, min(float(to_others[nearest]), 1.0)
        else:
            stays[row] = True


def _save_rejected_sheet(ledger: Ledger, reader: Reader, teacher: Teacher, path: Path) -> None:
    rejected = ledger.rejected_pictures()
    records = [(one.key, one.text, one.x0) for one in reader.records() if one.key in rejected]
    labels = [f"{key} {rejected[key].source}: {rejected[key].reason} - {text}" for key, text, _ in records]
    device = teacher.components.unet.device
    pictures = (teacher.decode_latents(x0[None].float().to(device))[0] for _, _, x0 in records)
    sizes = [teacher.components.latents.size_of_latents(*x0.shape[1:]) for _, _, x0 in records]
    longest_side = max((max(size.width, size.height) for size in sizes), default=None)
    save_contact_sheet(pictures, labels, path, {"judged_by": dict(ledger.judged_by)}, longest_side)
