"""Sentences and pictures of handwritten digits: a real digit in coloured ink on white paper, 64 x 64 pixels."""

import random
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from stages.prompts import Prompt, derived_seed
from stages.tiny.digits.digits import SIDE, UNMEASURED, Digits, load_digits
from stages.tiny.scenes import PIXELS, Scenes, World

INK = {"black": (25, 25, 30), "red": (215, 35, 35), "green": (15, 130, 55), "blue": (40, 70, 220)}
PAPER = (246, 246, 246)
CENTRE = {"left": 21, "middle": 32, "right": 43}
MAGNIFICATION = 1.75

Place = tuple[str, str]
"""The words for ink and place."""


@lru_cache(maxsize=2)
def candidates(held_out: bool) -> dict[tuple[int, int, int], list[int]]:
    """(digit, stroke, slant) -> the digits that have them; -1 stands for any stroke or slant."""
    digits = load_digits()
    lists: dict[tuple[int, int, int], list[int]] = {}
    for index in np.flatnonzero(digits.held_out == held_out).tolist():
        stroke, slant = int(digits.stroke[index]), int(digits.slant[index])
        for key in {(s, lean) for s in (stroke, UNMEASURED) for lean in (slant, UNMEASURED)}:
            lists.setdefault((int(digits.digit[index]), *key), []).append(index)
    return lists


def choose_digit(named: dict[str, str], rng: random.Random, held_out: bool = False) -> int:
    """The index of a digit with what a sentence names; the rest of it is left to chance."""
    key = [DIGITS.words(name).index(named[name]) if name in named else UNMEASURED for name in ("stroke", "slant")]
    return rng.choice(candidates(held_out)[DIGITS.words("digit").index(named["digit"]), key[0], key[1]])


def write_digit(ink: npt.NDArray[np.uint8], words: Place, rng: random.Random) -> tuple[npt.NDArray[np.uint8], ...]:
    """The picture [64, 64, 3] and the coverage of its ink [64, 64], with slight free variations of size and place."""
    colour, place = words
    side = round(SIDE * MAGNIFICATION * rng.uniform(0.95, 1.05))
    x, y = (CENTRE[place] + rng.uniform(-1.5, 1.5), PIXELS / 2 + rng.uniform(-1.5, 1.5))
    sheet = Image.new("L", (PIXELS, PIXELS))
    large = Image.fromarray(ink).resize((side, side), Image.Resampling.BICUBIC)
    sheet.paste(large, (round(x - side / 2), round(y - side / 2)))
    coverage = np.asarray(sheet)
    alpha = coverage[..., None].astype(np.float32) / 255
    shade = rng.uniform(0.92, 1.0)
    picture = alpha * np.array(INK[colour]) * shade + (1 - alpha) * np.array(PAPER)
    return picture.round().astype(np.uint8), coverage


def scene_labels(digits: Digits, index: int, words: Place) -> list[int]:
    """The index of each attribute's word, in the order of the world's attributes; -1 where none applies."""
    measured = {
        "stroke": int(digits.stroke[index]),
        "slant": int(digits.slant[index]),
        "digit": int(digits.digit[index]),
        "ink": DIGITS.words("ink").index(words[0]),
        "place": DIGITS.words("place").index(words[1]),
    }
    return [measured[name] for name in DIGITS.attributes]


def full_sentence(labels: list[int]) -> str:
    """The sentence that names every attribute that applies."""
    words = {name: DIGITS.words(name)[i] for name, i in zip(DIGITS.attributes, labels, strict=True) if i >= 0}
    return DIGITS.grammar().compose(words)


def _scenes(rows: list[tuple[int, Place, random.Random, str | None]]) -> Scenes:
    digits = load_digits()
    pictures, coverage, labels, texts = [], [], [], []
    for index, words, rng, text in rows:
        picture, covered = write_digit(digits.ink[index], words, rng)
        pictures.append(torch.from_numpy(picture).permute(2, 0, 1))
        coverage.append(torch.from_numpy(covered.copy()))
        labels.append(scene_labels(digits, index, words))
        texts.append(full_sentence(labels[-1]) if text is None else text)
    return Scenes(torch.stack(pictures), torch.stack(coverage), torch.tensor(labels), tuple(texts))


def _row(prompt: Prompt) -> tuple[int, Place, random.Random, str]:
    rng = random.Random(prompt.seed)
    named = DIGITS.named(prompt.text)
    index = choose_digit(named, rng)
    ink, place = (named.get(name) or rng.choice(DIGITS.words(name)) for name in ("ink", "place"))
    return index, (ink, place), rng, prompt.text


def draw_scenes(count: int, seed: int) -> Scenes:
    """The pictures of the first `count` sentences of a seed, of digits that are not held out."""
    grammar = DIGITS.grammar()
    return _scenes([_row(grammar.prompt(seed, index)) for index in range(count)])


def draw_held_out(seed: int) -> Scenes:
    """Each held-out digit once, in random ink at a random place, with the sentence that names all of it."""
    rows: list[tuple[int, Place, random.Random, str | None]] = []
    for index in np.flatnonzero(load_digits().held_out).tolist():
        rng = random.Random(derived_seed("held out", seed, index))
        rows.append((index, (rng.choice(DIGITS.words("ink")), rng.choice(DIGITS.words("place"))), rng, None))
    return _scenes(rows)


DIGITS = World(
    grammar_file=Path(__file__).with_name("grammar.yaml"),
    attributes=("stroke", "slant", "ink", "digit", "place"),
    draw=draw_scenes,
)
