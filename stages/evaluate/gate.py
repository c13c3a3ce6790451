"""The gate of class pictures: what does not show its class, or shows what another does, is set aside."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import mkdtemp
from typing import get_args

import torch
from pydantic import Field, JsonValue
from tqdm import tqdm

from configs.refusal import Refused
from configs.strict import Location, Strict
from shards.reader import Reader
from stages.evaluate.clip import ClipScorer
from stages.evaluate.contact import SHEET, save_contact_sheet
from stages.evaluate.flaws import Candidates, alike, least, low
from stages.evaluate.metrics import Scorer
from stages.nets.teacher import Teacher
from stages.pictures import Ledger, Picture, PicturesConfig, Source, Wanted
from stages.pictures.ledger import NAME as LEDGER

ROWS_AT_ONCE = 8
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


def judge(
    folder: Path,
    wanted: Wanted,
    teacher: Teacher,
    scorer: Scorer | None,
    config: GateConfig,
    sources: PicturesConfig,
    accept: Callable[[Ledger], object] = lambda _ledger: None,
) -> Ledger:
    """Write pictures.json and the sheet of what is set aside into `folder`, which is RUN/classes; nothing is deleted.

    Raises `Refused` naming a class that has no picture left, and whatever `accept` raises of the ledger: what an
    earlier judgement left is as it was then.
    """
    reader = Reader(folder / "cache")
    judged_by = _judged_by(reader, scorer, config, sources)
    if found := _known(folder, judged_by, [head.key for head in reader.heads()]):
        accept(found)
        return found
    seen = _look(reader, wanted, teacher, scorer if config.score is not None else None)
    reasons = low(seen, config.score)
    for rows in _by_class(seen, wanted):
        reasons |= alike(seen, [row for row in rows if row not in reasons], config.duplicate)

    pictures = {
        key: Picture(
            class_name=wanted.class_of[int(key)],
            source=(source := wanted.source(int(key))),
            target=sources.target(source),
            kept=row not in reasons,
            reason=reasons.get(row, ""),
        )
        for row, key in enumerate(seen.keys)
    }
    ledger = Ledger(judged_by, pictures)
    if emptied(ledger, wanted):
        # What an earlier judgement drew belongs to the run that goes by it.
        sheet = Path(mkdtemp(prefix="sollune-") if (folder / LEDGER).exists() else folder) / SHEET
        _show(ledger, reader, teacher, sheet)
        refuse_emptied(ledger, wanted, sheet)
    accept(ledger)
    _show(ledger, reader, teacher, folder / SHEET)
    ledger.save(folder)
    return ledger


def scorer_of(config: GateConfig, scorer: Scorer | None, device: torch.device) -> Scorer | None:
    """Who scores the pictures of the classes; raises `Refused` where CLIP is asked for and cannot be loaded."""
    return ClipScorer(config.clip, device) if config.clip else scorer


def emptied(ledger: Ledger, wanted: Wanted) -> bool:
    """Whether a class has no picture left."""
    kept = {one.class_name for one in ledger.pictures.values() if one.kept}
    return any(name not in kept for name in wanted.class_of)


def refuse_emptied(ledger: Ledger, wanted: Wanted, sheet: Path) -> None:
    """Raise `Refused` naming a class whose pictures are all set aside, or were never made."""
    kept = Counter(one.class_name for one in ledger.pictures.values() if one.kept)
    for name, asked in Counter(wanted.class_of).items():
        if kept[name]:
            continue
        why = Counter(one.reason.split()[0] for one in ledger.set_aside().values() if one.class_name == name)
        raise Refused(
            f"class {name!r}: none of its {asked} pictures is left ({_counted(why)}, {asked - why.total()} not made) - "
            f"look at {sheet}, then lower gate.score or ask for other pictures"
        )


def told(ledger: Ledger) -> str:
    """What was set aside, in one line."""
    aside = ledger.set_aside().values()
    why = Counter(one.reason.split()[0] for one in aside)
    by_class = ", ".join(f"{name} {count}" for name, count in Counter(one.class_name for one in aside).items())
    where = f" ({by_class})" if aside else ""
    return f"set aside: {len(aside)} of {len(ledger.pictures)} pictures, {_counted(why)}{where}"


def _counted(why: Counter[str]) -> str:
    return f"{why['score']} by their score, {why['like']} as near-duplicates"


def _judged_by(
    reader: Reader, scorer: Scorer | None, config: GateConfig, sources: PicturesConfig
) -> dict[str, JsonValue]:
    name = getattr(scorer, "__module__", "") + "." + getattr(scorer, "__qualname__", type(scorer).__qualname__)
    return {
        "recipe": reader.manifest.recipe.fingerprint(),
        "scorer": name if scorer else None,
        "gate": config.model_dump(mode="json"),
        "targets": {source: sources.target(source) for source in get_args(Source)},
    }


def _known(folder: Path, judged_by: dict[str, JsonValue], keys: Sequence[str]) -> Ledger | None:
    """The ledger that lies there, if it is about these very pictures and made in this way."""
    try:
        ledger = Ledger.open(folder)
    except Refused:
        return None  # there is none, or it is broken: it is made anew
    return ledger if (dict(ledger.judged_by), list(ledger.pictures)) == (judged_by, list(keys)) else None


def _look(reader: Reader, wanted: Wanted, teacher: Teacher, scorer: Scorer | None) -> Candidates:
    found = [(record.key, record.x0) for record in reader.records()]
    keys, x0 = [key for key, _ in found], torch.stack([latent for _, latent in found])
    score = torch.full([len(keys)], torch.nan)
    # A person chose the photographs; and what they are called may be a word that no scorer knows.
    rows = [row for row, key in enumerate(keys) if wanted.source(int(key)) != "photograph"]
    if scorer is None:
        return Candidates(keys, x0, score)
    for first in tqdm(range(0, len(rows), ROWS_AT_ONCE), desc="gate", disable=None):
        some = rows[first : first + ROWS_AT_ONCE]
        pictures = teacher.decode(x0[some].float().to(teacher.parts.unet.device))
        score[some] = least(dict(scorer([wanted.prompts[int(keys[row])].text for row in some], pictures)))
    return Candidates(keys, x0, score)


def _by_class(seen: Candidates, wanted: Wanted) -> list[list[int]]:
    rows: dict[str, list[int]] = {}
    for row, key in enumerate(seen.keys):
        rows.setdefault(wanted.class_of[int(key)], []).append(row)
    return list(rows.values())


def _show(ledger: Ledger, reader: Reader, teacher: Teacher, path: Path) -> None:
    """Draw what is set aside."""
    aside = ledger.set_aside()
    found = [(one.key, one.text, one.x0) for one in reader.records() if one.key in aside]
    labels = [f"{key} {aside[key].source}: {aside[key].reason} - {text}" for key, text, _ in found]
    device = teacher.parts.unet.device
    pictures = (teacher.decode(x0[None].float().to(device))[0] for _, _, x0 in found)
    save_contact_sheet(pictures, labels, path, {"judged_by": dict(ledger.judged_by)})
