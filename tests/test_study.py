"""Laws of stage three's batches: who is drawn how often, and how much of the past stays in each batch."""

from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch

from configs.refusal import Refused
from shards.reader import Reader
from shards.recipe import Recipe
from shards.record import BlockFeatures, Draws, Record
from shards.writer import CacheWriter
from stages.classes import ClassFile, ClassSpec, draw_weights
from stages.train.mixture import Mixture, rows_of

FILE = ClassFile(
    classes=(
        ClassSpec(name="stars", pattern="star/*", priority="top"),
        ClassSpec(name="rings", pattern="ring/*", priority="low"),
    )
)


def record(number: int, class_name: str) -> Record:
    state = torch.full((2, 3, 4, 5), float(number)).half()
    draws = Draws(torch.tensor([1, 2]), torch.tensor([0.1, 0.2]), state, state, state, torch.tensor([True, False]))
    features = BlockFeatures({"mid": torch.zeros(2, 3).half()})
    cond, x0 = torch.zeros(6, 7).half(), torch.zeros(3, 4, 5).half()
    return Record(f"{number:09d}", "a picture", class_name, number, 5.0, cond, x0, draws, features)


def cache(folder: Path, class_names: list[str]) -> Path:
    writer = CacheWriter(folder, Recipe(identity={"made_for": "this test"}))
    writer.add("train", 0, [record(i, name) for i, name in enumerate(class_names)])
    return folder


@pytest.fixture
def mixture(tmp_path: Path) -> Mixture:
    names = ["star/red", "star/red", "star/blue", "ring/red"]
    weights = draw_weights(FILE, Counter(names))
    return Mixture(
        classes=Reader(cache(tmp_path / "classes", names), "train", 0, 6, class_weights=weights),
        prior=Reader(cache(tmp_path / "prior", ["heart/red", "moon/red", "moon/blue"]), "train", 0, 2),
    )


def test_a_class_keeps_its_share_however_its_records_are_spread_over_names() -> None:
    weights = draw_weights(FILE, Counter({"star/red": 3, "star/blue": 1, "ring/red": 9, "moon/red": 5}))
    assert weights == pytest.approx({"star/red": 0.6, "star/blue": 0.2, "ring/red": 0.2, "moon/red": 0.0})


def test_drawn_shares_are_the_stated_ones_within_three_standard_errors(mixture: Mixture) -> None:
    batches = list(islice(mixture.batches(0), 400))
    drawn = Counter(name.split("/")[0] for batch in batches for name in batch.class_names[:6])
    n, share = 2400, 0.8
    assert abs(drawn["star"] / n - share) < 3 * (share * (1 - share) / n) ** 0.5


def test_every_batch_holds_the_same_number_of_prior_rows(mixture: Mixture) -> None:
    for batch in islice(mixture.batches(0), 20):
        assert [name.split("/")[0] in ("heart", "moon") for name in batch.class_names] == [False] * 6 + [True] * 2


def test_the_stream_goes_on_at_any_batch(mixture: Mixture) -> None:
    fifth = next(islice(mixture.batches(0), 5, None))
    again = next(mixture.batches(5 * 8))
    assert fifth.keys == again.keys
    assert torch.equal(fifth.x_t, again.x_t)


@pytest.mark.parametrize("share", [0.01, 0.99])
def test_a_share_that_leaves_a_stream_without_rows_is_refused(share: float) -> None:
    assert rows_of(32, 0.3) == (22, 10)
    with pytest.raises(Refused, match=f"prior_share = {share}"):
        rows_of(32, share)
