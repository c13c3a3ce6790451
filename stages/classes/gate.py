"""What can be wrong with a picture of a class: it does not show what was said, or it shows what another one does.

The gate of class pictures: what does not show its class, or shows what another does, is set aside.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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
from stages.classes.ledger import LEDGER_FILE as LEDGER
from stages.classes.ledger import Ledger, Picture, PictureSource
from stages.classes.pictures import PicturePlan, PicturesConfig
from stages.evaluate.clip import ClipScorer
from stages.evaluate.metrics import Scorer
from stages.nets.teacher import Teacher
from stages.sampling.grids import SHEET_FILE, save_contact_sheet
from stages.system.refusal import Refused

COSINE_TOLERANCE = 1e-6
"""The cosine of a latent with itself may be so much below 1."""


@dataclass(frozen=True)
class Candidates:
    """The pictures that are there; x0 and score of each in the order of the keys."""

    keys: Sequence[str]
    x0: Float[Tensor, "n c h w"]
    score: Float[Tensor, " n"]
    """nan where nothing was said or asked"""


def lowest_scores(scores: dict[str, Float[Tensor, " b"]]) -> Float[Tensor, " b"]:
    """The lowest of what was said about each picture, nan where nothing was: 1 means that everything said is there."""
    values = torch.stack([value.float().cpu() for value in scores.values()])
    lowest = values.nan_to_num(nan=torch.inf).amin(0)
    return lowest.masked_fill(values.isnan().all(0), torch.nan)


def find_duplicates(x0: Float[Tensor, "n c h w"], threshold: float) -> Iterator[tuple[int, int, float]]:
    """(later, earlier, cosine) of each picture that shows what an earlier one does which is not such a one itself.

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


def low_score_reasons(candidates: Candidates, threshold: float | None) -> dict[int, str]:
    """Row -> why, of what scores too low."""
    if threshold is None:
        return {}
    rows = (candidates.score < threshold).nonzero().flatten().tolist()
    return {row: f"score {float(candidates.score[row]):.3g} is below {threshold:g}" for row in rows}


def duplicate_reasons(candidates: Candidates, rows: Sequence[int], threshold: float | None) -> dict[int, str]:
    """Row -> why, of what shows the same as an earlier picture of its class."""
    if threshold is None or not rows:
        return {}
    found = find_duplicates(candidates.x0[list(rows)], threshold)
    return {rows[later]: f"like {candidates.keys[rows[earlier]]} ({cosine:.3f})" for later, earlier, cosine in found}


SCORING_BATCH_SIZE = 8
"""Pictures that are decoded and scored together."""


class GateConfig(Strict):
    """Which pictures of the classes are set aside."""

    score: float | None = Field(
        0.2,
        description="least class score: the lowest of what the scorer says (1 right, 0 wrong), or CLIP's cosine; "
        "none takes all; photographs are not scored",
    )
    duplicate: float | None = Field(
        0.99,
        gt=0,
        le=1,
        description="cosine of two latents of a class from which on the later is set aside; none: never",
    )
    clip: Location | None = Field(
        None, description="folder or hub id of a CLIP model that scores in the scorer's place; none leaves it to that"
    )


def apply_gate(
    folder: Path,
    plan: PicturePlan,
    teacher: Teacher,
    scorer: Scorer | None,
    config: GateConfig,
    pictures_config: PicturesConfig,
    check_ledger: Callable[[Ledger], object] = lambda _ledger: None,
) -> Ledger:
    """Write pictures.json and the sheet of what is set aside into `folder`, which is RUN/classes; nothing is deleted.

    Raises `Refused` naming a class that has no picture left, and whatever `accept` raises of the ledger: what an
    earlier judgement left is as it was then.
    """
    reader = Reader(folder / "cache")
    judged_by = _gate_identity(reader, scorer, config, pictures_config)
    if found := _matching_ledger(folder, judged_by, [head.key for head in reader.headers()]):
        check_ledger(found)
        return found
    seen = _score_candidates(reader, plan, teacher, scorer if config.score is not None else None)
    reasons = low_score_reasons(seen, config.score)
    for rows in _rows_by_class(seen, plan):
        reasons |= duplicate_reasons(seen, [row for row in rows if row not in reasons], config.duplicate)

    pictures = {
        key: Picture(
            class_name=plan.class_of[int(key)],
            source=(source := plan.source_at(int(key))),
            target=pictures_config.target_for(source),
            kept=row not in reasons,
            reason=reasons.get(row, ""),
        )
        for row, key in enumerate(seen.keys)
    }
    ledger = Ledger(judged_by, pictures)
    if has_empty_class(ledger, plan):
        # What an earlier judgement drew belongs to the run that goes by it.
        sheet = Path(mkdtemp(prefix="sollune-") if (folder / LEDGER).exists() else folder) / SHEET_FILE
        _save_rejected_sheet(ledger, reader, teacher, sheet)
        refuse_empty_class(ledger, plan, sheet)
    check_ledger(ledger)
    _save_rejected_sheet(ledger, reader, teacher, folder / SHEET_FILE)
    ledger.save(folder)
    return ledger


def select_scorer(config: GateConfig, scorer: Scorer | None, device: torch.device) -> Scorer | None:
    """Who scores the pictures of the classes; raises `Refused` where CLIP is asked for and cannot be loaded."""
    return ClipScorer(config.clip, device) if config.clip else scorer


def has_empty_class(ledger: Ledger, plan: PicturePlan) -> bool:
    """Whether a class has no picture left."""
    kept = {one.class_name for one in ledger.pictures.values() if one.kept}
    return any(name not in kept for name in plan.class_of)


def refuse_empty_class(ledger: Ledger, plan: PicturePlan, sheet: Path) -> None:
    """Raise `Refused` naming a class whose pictures are all set aside, or were never made."""
    kept = Counter(one.class_name for one in ledger.pictures.values() if one.kept)
    for name, asked in Counter(plan.class_of).items():
        if kept[name]:
            continue
        why = Counter(one.reason.split()[0] for one in ledger.rejected_pictures().values() if one.class_name == name)
        raise Refused(
            f"class {name!r}: none of its {asked} pictures is left ({_reason_counts(why)}, {asked - why.total()} "
            "not made) - "
            f"look at {sheet}, then lower gate.score or ask for other pictures"
        )


def summary_line(ledger: Ledger) -> str:
    """What was set aside, in one line."""
    aside = ledger.rejected_pictures().values()
    why = Counter(one.reason.split()[0] for one in aside)
    by_class = ", ".join(f"{name} {count}" for name, count in Counter(one.class_name for one in aside).items())
    where = f" ({by_class})" if aside else ""
    return f"set aside: {len(aside)} of {len(ledger.pictures)} pictures, {_reason_counts(why)}{where}"


def _reason_counts(reasons: Counter[str]) -> str:
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


def _matching_ledger(folder: Path, gate_identity: dict[str, JsonValue], keys: Sequence[str]) -> Ledger | None:
    """The ledger that lies there, if it is about these very pictures and made in this way."""
    try:
        ledger = Ledger.open(folder)
    except Refused:
        return None  # there is none, or it is broken: it is made anew
    return ledger if (dict(ledger.judged_by), list(ledger.pictures)) == (gate_identity, list(keys)) else None


def _score_candidates(reader: Reader, plan: PicturePlan, teacher: Teacher, scorer: Scorer | None) -> Candidates:
    found = [(record.key, record.x0) for record in reader.records()]
    keys, x0 = [key for key, _ in found], torch.stack([latent for _, latent in found])
    score = torch.full([len(keys)], torch.nan)
    # A person chose the photographs; and what they are called may be a word that no scorer knows.
    rows = [row for row, key in enumerate(keys) if plan.source_at(int(key)) != "photograph"]
    if scorer is None:
        return Candidates(keys, x0, score)
    for first in tqdm(range(0, len(rows), SCORING_BATCH_SIZE), desc="gate", disable=None):
        some = rows[first : first + SCORING_BATCH_SIZE]
        pictures = teacher.decode_latents(x0[some].float().to(teacher.components.unet.device))
        score[some] = lowest_scores(dict(scorer([plan.prompts[int(keys[row])].text for row in some], pictures)))
    return Candidates(keys, x0, score)


def _rows_by_class(candidates: Candidates, plan: PicturePlan) -> list[list[int]]:
    rows: dict[str, list[int]] = {}
    for row, key in enumerate(candidates.keys):
        rows.setdefault(plan.class_of[int(key)], []).append(row)
    return list(rows.values())


def _save_rejected_sheet(ledger: Ledger, reader: Reader, teacher: Teacher, path: Path) -> None:
    """Draw what is set aside."""
    aside = ledger.rejected_pictures()
    found = [(one.key, one.text, one.x0) for one in reader.records() if one.key in aside]
    labels = [f"{key} {aside[key].source}: {aside[key].reason} - {text}" for key, text, _ in found]
    device = teacher.components.unet.device
    pictures = (teacher.decode_latents(x0[None].float().to(device))[0] for _, _, x0 in found)
    save_contact_sheet(pictures, labels, path, {"judged_by": dict(ledger.judged_by)})
