"""Wanted pictures -> records, whichever way each is had."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache as cache_once
from pathlib import Path
from typing import TypeAlias

import torch

from configs.refusal import Refused
from shards.reader import Reader
from shards.record import Record
from stages.cluster import Make
from stages.nets.teacher import Teacher
from stages.pictures.ledger import Source
from stages.pictures.listing import source_of
from stages.pictures.photographs import Photograph, shown_in
from stages.pictures.reuse import Cached
from stages.prompts import Prompt
from stages.targets import StatesConfig, make_records, records_of

Makers: TypeAlias = Mapping[Source, Make]


def make_pictures(teacher: Teacher, cache: Path, config: StatesConfig, fit_steps: int = 0) -> Make:
    """What makes the records of a batch of wanted pictures.

    `cache` is the one that pictures are taken from; `fit_steps` fit the latents of photographs to the decoder.
    """

    def paint(prompts: Sequence[Prompt], keys: Sequence[str]) -> list[Record]:
        return make_records(teacher, prompts, keys, config)

    def develop(prompts: Sequence[Prompt], keys: Sequence[str]) -> list[Record]:
        shown = shown_in([one for one in prompts if isinstance(one, Photograph)], teacher.parts.pixels)
        x0 = torch.stack([teacher.fitted(one, fit_steps) for one in shown]) if fit_steps else teacher.latents(shown)
        return records_of(teacher, prompts, keys, x0, config)

    return by_source({"painted": paint, "reused": taken_from(cache), "photograph": develop})


def by_source(makers: Makers) -> Make:
    """Each prompt by the maker of its source, all of one source in one batch."""

    def make(prompts: Sequence[Prompt], keys: Sequence[str]) -> list[Record]:
        found: dict[str, Record] = {}
        for source, maker in makers.items():
            rows = [(one, key) for one, key in zip(prompts, keys, strict=True) if source_of(one) == source]
            if rows:
                found |= {record.key: record for record in maker(*map(list, zip(*rows, strict=True)))}
        return [found[key] for key in keys]

    return make


def taken_from(cache: Path) -> Make:
    """Records of a cache under new keys; the cache is opened when the first is asked for."""
    opened = cache_once(lambda: Reader(cache))

    def take(prompts: Sequence[Prompt], keys: Sequence[str]) -> list[Record]:
        taken = []
        for prompt, key in zip(prompts, keys, strict=True):
            record = opened().number(prompt.number) if isinstance(prompt, Cached) else None
            if record is None or record.text != prompt.text:
                raise Refused(f"{cache}: changed while it was read - start the command again")
            taken.append(replace(record, key=key))
        return taken

    return take
