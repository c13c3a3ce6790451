"""Laws of the batches of class finetuning: sampling shares, prior rows, data targets, and the settings' refusals."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.load import load
from configs.values import PictureSize
from shards.manifest import Recipe
from shards.reader import Reader
from shards.record import BlockFeatures, Record, States
from shards.writer import CacheWriter
from stages.classes.mixture import DataTarget, Mixture, class_numbers, split_batch_size
from stages.classes.selection import sampling_weights
from stages.classes.specification import ClassFile, ClassSpec
from stages.finetune_classes import Config
from stages.flow.timesteps import TimestepDensity
from stages.system.refusal import Refused

FILE = ClassFile(
    classes=(
        ClassSpec(name="stars", pattern="star/*", priority="top"),
        ClassSpec(name="rings", pattern="ring/*", priority="low"),
    )
)


def record(number: int, class_name: str) -> Record:
    state = torch.full((2, 3, 4, 5), float(number)).half()
    states = States(torch.tensor([1, 2]), torch.tensor([0.1, 0.2]), state, state, state, torch.tensor([True, False]))
    features = BlockFeatures({"mid": torch.zeros(2, 3).half()})
    cond, x0 = torch.zeros(6, 7).half(), torch.zeros(3, 4, 5).half()
    return Record(
        f"{number:09d}", "a picture", class_name, number, 5.0, cond, x0, states, features, PictureSize(40, 32)
    )


def cache(folder: Path, class_names: list[str]) -> Path:
    writer = CacheWriter(folder, Recipe(identity={"made_for": "this test"}))
    writer.add("train", 0, [record(i, name) for i, name in enumerate(class_names)])
    return folder


@pytest.fixture
def mixture(tmp_path: Path) -> Mixture:
    names = ["star/red", "star/red", "star/blue", "ring/red"]
    weights = sampling_weights(FILE, Counter(names))
    return Mixture(
        classes=Reader(cache(tmp_path / "classes", names), "train", 0, 6, class_weights=weights),
        prior=Reader(cache(tmp_path / "prior", ["heart/red", "moon/red", "moon/blue"]), "train", 0, 2),
        class_names=("stars", "rings"),
        class_numbers=class_numbers(FILE, names),
        rows=lambda _size: (6, 2),
    )


def test_a_class_keeps_its_share_for_any_spread_of_its_records_over_names() -> None:
    weights = sampling_weights(FILE, Counter({"star/red": 3, "star/blue": 1, "ring/red": 9, "moon/red": 5}))
    assert weights == pytest.approx({"star/red": 0.6, "star/blue": 0.2, "ring/red": 0.2, "moon/red": 0.0})


def test_sampled_shares_are_the_stated_ones_within_three_standard_errors(mixture: Mixture) -> None:
    batches = list(islice(mixture.batches(0), 400))
    counts = Counter(name.split("/")[0] for batch in batches for name in batch.class_names[:6])
    n, share = 2400, 0.8
    assert abs(counts["star"] / n - share) < 3 * (share * (1 - share) / n) ** 0.5


def test_every_batch_holds_the_same_number_of_prior_rows(mixture: Mixture) -> None:
    for batch in islice(mixture.batches(0), 20):
        assert [name.split("/")[0] in ("heart", "moon") for name in batch.class_names] == [False] * 6 + [True] * 2


def test_the_stream_resumes_at_any_batch(mixture: Mixture) -> None:
    fifth = next(islice(mixture.batches(0), 5, None))
    again = next(mixture.batches(5 * 8))
    assert fifth.keys == again.keys
    assert torch.equal(fifth.x_s, again.x_s)


@pytest.mark.parametrize("world", [2, 3, 8])
def test_the_ranks_share_the_rows_of_each_batch(mixture: Mixture, world: int) -> None:
    ranks = [replace(mixture, rank=rank, world=world).batches(3 * 8) for rank in range(world)]
    for batch in islice(mixture.batches(3 * 8), 3):
        parts = [next(rank) for rank in ranks]
        for rank, part in enumerate(parts):
            assert part.keys == batch.keys[rank::world]
            assert torch.equal(part.x_s, batch.x_s[rank::world])


@pytest.mark.parametrize("share", [0.01, 0.99])
def test_a_share_that_leaves_a_stream_without_rows_is_refused(share: float) -> None:
    assert split_batch_size(32, 0.3) == (22, 10)
    with pytest.raises(Refused, match=f"prior_share = {share}"):
        split_batch_size(32, share)


@pytest.fixture
def labelled(mixture: Mixture) -> Mixture:
    """The third star has the target data; each row has the number of its class or of the prior."""
    reader = mixture.classes
    data = DataTarget.from_records([reader.record("000000002")], {"000000002": 3.0}, seed=0, density=TimestepDensity())
    return replace(mixture, data_target=data)


def test_rows_with_data_targets_are_the_same_on_every_number_of_ranks(labelled: Mixture) -> None:
    whole = list(islice(labelled.batches(2 * 8), 6))
    assert any(batch.own_guidance is not None for batch in whole)
    ranks = [replace(labelled, rank=rank, world=2).batches(2 * 8) for rank in range(2)]
    for batch in whole:
        for rank in range(2):
            part, of = next(ranks[rank]), batch.rows(slice(rank, None, 2))
            assert torch.equal(part.x_s, of.x_s)
            assert torch.equal(part.s, of.s)
            assert torch.equal(part.v_cond, of.v_cond)
            own = [3.0 * (key == "000000002" and group < 2) for key, group in zip(part.keys, part.group, strict=True)]
            assert ([0.0] * 4 if part.own_guidance is None else part.own_guidance.tolist()) == own


def test_rows_with_data_targets_are_the_same_when_a_run_resumes(labelled: Mixture) -> None:
    fifth, again = next(islice(labelled.batches(0), 5, None)), next(labelled.batches(5 * 8))
    assert torch.equal(fifth.x_s, again.x_s)
    assert torch.equal(fifth.s, again.s)


def test_each_row_is_counted_to_its_class_or_to_the_prior(labelled: Mixture) -> None:
    assert labelled.group_names == ("stars", "rings", "(prior)")
    for batch in islice(labelled.batches(0), 10):
        expected = [0 if name.startswith("star") else 1 for name in batch.class_names[:6]] + [2, 2]
        assert batch.group.tolist() == expected


def test_generated_pictures_with_guidance_below_one_may_not_have_the_target_data() -> None:
    config, options = [Path("configs/tiny.yaml")], ["--render.states.guidance-min", "0.5", "--pictures.painted"]
    with pytest.raises(Refused, match=r"pictures\.painted = data, but they are generated at guidance 0\.5"):
        load(Config, "finetune_classes", config, [*options, "data"])
    assert load(Config, "finetune_classes", config, [*options, "teacher"]).pictures.target_for("painted") == "teacher"


def test_a_stop_by_lost_pictures_needs_a_scorer() -> None:
    options = ["--stop.patience", "2", "--scorer", "None"]
    with pytest.raises(Refused, match=r"most_lost counts right pictures"):
        load(Config, "finetune_classes", [Path("configs/tiny.yaml")], options)


UPRIGHT, FLAT, SQUARE = PictureSize(32, 40), PictureSize(40, 32), PictureSize(32, 32)
ROWS = {UPRIGHT: (3, 1), FLAT: (6, 2), SQUARE: (4, 3)}


def sized_cache(folder: Path, class_names: Sequence[str], sizes: Sequence[PictureSize]) -> Path:
    """A cache of records of these names and sizes, in turn."""
    writer = CacheWriter(folder, Recipe(identity={"made_for": "this test"}))
    records = [record(number, name) for number, name in enumerate(class_names)]
    for size in sorted(set(sizes)):
        own = [sized(one, size) for one, of_size in zip(records, sizes, strict=True) if of_size == size]
        writer.add("train", 0, own, size=size)
    return folder


def sized(one: Record, size: PictureSize) -> Record:
    shape = (3, size.height // 8, size.width // 8)
    latents = {name: torch.full((2, *shape), float(one.seed)).half() for name in ("x_s", "v_cond", "v_uncond")}
    x0 = torch.zeros(shape).half()
    return replace(one, size=size, x0=x0, states=replace(one.states, **latents))


def sized_mixture(folder: Path, class_sizes: list[PictureSize], prior_sizes: list[PictureSize], **of: Any) -> Mixture:
    names = ["star/red", "ring/red", "star/blue"] * (len(class_sizes) // 3)
    classes = sized_cache(folder / "classes", names, class_sizes)
    prior = sized_cache(folder / "prior", ["moon/red"] * len(prior_sizes), prior_sizes)
    weights = sampling_weights(FILE, Counter(names))
    return Mixture(
        classes=Reader(classes, "train", 0, class_weights=weights),
        prior=Reader(prior, "train", 0),
        class_names=("stars", "rings"),
        class_numbers=class_numbers(FILE, names),
        rows=lambda size: ROWS[size],
        **of,
    )


@pytest.fixture
def several(tmp_path: Path) -> Mixture:
    """Twice as many upright pictures of the classes as flat ones; the prior has squares too."""
    return sized_mixture(tmp_path, [UPRIGHT, UPRIGHT, FLAT] * 6, [FLAT, UPRIGHT, SQUARE] * 3)


def test_a_batch_has_one_size_and_its_rows_of_both_streams(several: Mixture) -> None:
    for batch in islice(several.batches(0), 30):
        in_classes, in_prior = ROWS[batch.size]
        assert batch.x_s.shape[2:] == (batch.size.height // 8, batch.size.width // 8)
        assert [name == "moon/red" for name in batch.class_names] == [False] * in_classes + [True] * in_prior


def test_the_rows_of_the_classes_come_in_the_shares_of_their_sizes(several: Mixture) -> None:
    rows = Counter[PictureSize]()
    for batch in islice(several.batches(0), 400):
        rows[batch.size] += ROWS[batch.size][0]
    shares = dict(zip(several.classes.sizes, several.classes.schedule.samples, strict=True))
    assert set(rows) == {UPRIGHT, FLAT}
    for size, number in rows.items():
        assert abs(number - shares[size] / sum(shares.values()) * sum(rows.values())) <= 2 * ROWS[size][0]


def test_each_size_of_the_prior_comes_once_before_any_comes_twice(several: Mixture) -> None:
    seen: dict[PictureSize, list[tuple[str, int]]] = {UPRIGHT: [], FLAT: []}
    for batch in islice(several.batches(0), 40):
        rows = zip(batch.keys, batch.state_index.tolist(), batch.class_names, strict=True)
        seen[batch.size] += [(key, state) for key, state, name in rows if name == "moon/red"]
    for drawn in seen.values():
        epochs = [drawn[first : first + 6] for first in range(0, len(drawn) - 5, 6)]
        assert len(epochs) > 1
        assert all(len(set(epoch)) == 6 for epoch in epochs)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_the_rows_of_any_size_from_any_batch_on(several: Mixture, world: int) -> None:
    whole = list(islice(several.batches(0), 12))
    start = sum(map(len, whole[:5]))
    ranks = [replace(several, rank=rank, world=world).batches(start) for rank in range(world)]
    for batch in whole[5:]:
        for rank, stream in enumerate(ranks):
            part = next(stream)
            assert part.keys == batch.keys[rank::world]
            assert torch.equal(part.x_s, batch.x_s[rank::world])
            assert torch.equal(part.group, batch.group[rank::world])
    with pytest.raises(ValueError, match="1 rows into a batch"):
        next(several.batches(start + 1))


def test_a_size_that_the_prior_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"prior: holds no picture of 32x40, .*; it has 40x32 - render it there too"):
        next(sized_mixture(tmp_path, [UPRIGHT, FLAT, FLAT], [FLAT]).batches(0))
