"""A cache of several sizes is one stream, however many ranks and threads read it and wherever they begin."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from configs.values import PictureSize
from shards.manifest import Manifest
from shards.opened import MAX_OPEN_FILES, OpenShards
from shards.reader import Reader
from shards.stream.order import WINDOW
from shards.stream.schedule import SizedOrder, grouped_by_size
from shards.stream.view import View
from stages.system.refusal import Refused
from tests.shards.conftest import SIZES, make_sized_record, size_of_number

TRAIN = 14
GLOBAL_ROWS = 30
"""Rows of one batch of all ranks: worlds of 1, 2, 3 and 5 divide it."""


@pytest.fixture(scope="module")
def cache(make_sized_cache, tmp_path_factory):
    return make_sized_cache(tmp_path_factory.mktemp("sized") / "cache")


def pairs_of(batch):
    return list(zip(batch.keys, batch.state_index.tolist(), strict=True))


def ranks(cache, world, start=0, blocks=8, **options):
    """The batches of each rank."""
    options = {"batch_size": GLOBAL_ROWS // world} | options
    readers = [Reader(cache, seed=3, rank=rank, world=world, **options) for rank in range(world)]
    return [list(itertools.islice(reader.batches(start), blocks)) for reader in readers]


@pytest.mark.parametrize("budget", [2 << 30, 0])
@pytest.mark.parametrize("workers", [0, 3])
def test_each_batch_has_one_size_and_the_rows_that_it_names(cache, budget, workers):
    reader = Reader(cache, batch_size=5, memory_budget_bytes=budget, workers=workers)
    for block, batch in zip(itertools.islice(reader.schedule.blocks(), 12), reader.batches(), strict=False):
        assert batch.size == reader.sizes[block.size]
        assert batch.x_s.shape == (5, 3, batch.size.height // 8, batch.size.width // 8)
        for row, (key, state) in enumerate(pairs_of(batch)):
            sent = make_sized_record(int(key), size_of_number(int(key)))
            assert sent.size == batch.size
            assert (batch.texts[row], batch.class_names[row]) == (sent.text, sent.class_name)
            assert batch.cond[row].equal(sent.cond)
            for name in ("k", "s", "x_s", "v_cond", "v_uncond"):
                assert getattr(batch, name)[row].equal(getattr(sent.states, name)[state])
            for name, values in sent.features.by_block.items():
                assert batch.features[name][row].equal(values[state])


PIXELS = {2: 20 * 40 * 32, 3: 30 * 40 * 32, 5: 5 * 40 * 32}
"""World -> pixels of a batch of which each size has a number of rows that divides among so many ranks."""


@pytest.mark.parametrize("by_pixels", [False, True])
@pytest.mark.parametrize("world", [2, 3, 5])
def test_the_ranks_of_a_world_read_together_what_one_process_reads(cache, world, by_pixels):
    options = {"batch_pixels": PIXELS[world]} if by_pixels else {}
    several = ranks(cache, world, **options)
    (alone,) = ranks(cache, 1, **options)
    for whole, parts in zip(alone, zip(*several, strict=True), strict=True):
        assert {part.size for part in parts} == {whole.size}
        assert Counter(itertools.chain(*map(pairs_of, parts))) == Counter(pairs_of(whole))
        assert [pair for row in zip(*map(pairs_of, parts), strict=True) for pair in row] == pairs_of(whole)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 3), (3, 1), (5, 2)])
@pytest.mark.parametrize("left", [1, 4, 7])
def test_another_world_goes_on_with_the_same_stream_from_any_batch(cache, before, after, left):
    (whole,) = ranks(cache, 1, blocks=12)
    start = Reader(cache, batch_size=GLOBAL_ROWS).schedule.first_sample(left)
    first, second = ranks(cache, before, blocks=left), ranks(cache, after, start, blocks=12 - left)
    for world in (first, second):
        assert len({len(batches) for batches in world}) == 1
    resumed = [
        Counter(itertools.chain(*map(pairs_of, parts)))
        for world in (first, second)
        for parts in zip(*world, strict=True)
    ]
    assert resumed == [Counter(pairs_of(batch)) for batch in whole]


def test_each_epoch_of_a_size_has_every_state_once(cache):
    reader = Reader(cache, batch_size=4, workers=0)
    seen = {size: [] for size in reader.sizes}
    for batch in itertools.islice(reader.batches(), 40):
        seen[batch.size] += pairs_of(batch)
    for size, stream in seen.items():
        wanted = sorted((f"{n:09d}", k) for n in range(TRAIN) if size_of_number(n) == size for k in range(2))
        for first in range(0, len(stream) - len(wanted) + 1, len(wanted)):
            assert sorted(stream[first : first + len(wanted)]) == wanted
    assert reader.samples_per_epoch == 2 * TRAIN


def test_rows_follow_from_pixels(cache):
    reader = Reader(cache, batch_pixels=3 * 40 * 32)
    assert {size: reader.rows_of(size) for size in reader.sizes} == {size: 3840 // size.pixels for size in SIZES}
    assert {len(batch) for batch in itertools.islice(reader.batches(), 8)} == {3}
    assert Reader(cache, batch_pixels=1).rows_of(SIZES[0]) == 1


def test_rows_that_do_not_divide_among_the_ranks_are_refused(cache):
    reader = Reader(cache, world=2, batch_pixels=3 * 40 * 32)
    with pytest.raises(Refused, match=r"batch_pixels = 3840: gives 3 rows at 24x48, .* 2 processes - take"):
        next(reader.batches())


@pytest.mark.parametrize("start", [1, 4, 33])
def test_a_start_inside_a_batch_is_an_error(cache, start):
    with pytest.raises(ValueError, match="rows into a batch"):
        next(Reader(cache, batch_size=5).batches(start))


@pytest.mark.parametrize("budget", [2 << 30, 0])
def test_a_view_of_one_size_is_a_cache_of_that_size(cache, tmp_path, make_recipe, budget):
    from shards.writer import CacheWriter

    size = SIZES[0]
    records = [record for record in Reader(cache).records() if record.size == size]
    writer = CacheWriter(tmp_path, make_recipe())
    for index, first in enumerate(range(0, len(records), 3)):
        writer.add("train", index, records[first : first + 3])
    alone = Reader(tmp_path, seed=5, batch_size=4, memory_budget_bytes=budget)
    view = Reader(cache, seed=5, batch_size=4, view=View(size=size), memory_budget_bytes=budget)
    assert view.sizes == alone.sizes == (size,)
    assert view.samples_per_epoch == alone.samples_per_epoch
    assert view.timesteps_of_sizes[0].tolist() == alone.timesteps_of_sizes[0].tolist()
    for one, other in itertools.islice(zip(view.batches(7), alone.batches(7), strict=True), 6):
        assert pairs_of(one) == pairs_of(other)
        assert one.x_s.equal(other.x_s)


def test_a_view_of_a_size_that_is_not_there_is_refused(cache):
    with pytest.raises(Refused, match="no picture of split train is 8x8"):
        Reader(cache, view=View(size=PictureSize(8, 8))).samples_per_epoch  # noqa: B018


@pytest.mark.parametrize("view", [View(s_range=(0.2, 0.7)), View(classes="*/star"), View(prompt_fraction=0.5)])
def test_a_view_takes_its_part_of_each_size(cache, view):
    reader = Reader(cache, batch_size=3, view=view, workers=0)
    wanted = Counter()
    for record in Reader(cache).headers():
        wanted[record.size] += int(view.mask([record]).sum())
    assert dict(zip(reader.sizes, map(len, reader.pairs_of_sizes), strict=True)) == {
        s: n for s, n in wanted.items() if n
    }
    steps = [
        k for record in Reader(cache).headers() for k, kept in zip(record.k, view.mask([record]), strict=True) if kept
    ]
    assert sorted(np.concatenate(reader.timesteps_of_sizes)) == sorted(steps)
    for batch in itertools.islice(reader.batches(), 6):
        assert ((batch.s >= view.s_range[0]) & (batch.s <= view.s_range[1])).all()


def test_timesteps_of_sizes_are_those_of_their_pairs(cache):
    reader = Reader(cache)
    headers = list(reader.headers())
    for pairs, steps in zip(reader.pairs_of_sizes, reader.timesteps_of_sizes, strict=True):
        records, states = pairs.locate(np.arange(len(pairs)))
        assert steps.tolist() == [headers[r].k[i] for r, i in zip(records, states, strict=True)]


def test_class_weights_are_shares_of_the_samples_of_all_sizes(cache):
    weights = {"shape/star": 6.0, "shape/disc": 3.0, "shape/ring": 1.0}
    reader = Reader(cache, batch_size=20, class_weights=weights, workers=0)
    names = Counter(name for batch in itertools.islice(reader.batches(), 300) for name in batch.class_names)
    for name, weight in weights.items():
        share = weight / 10
        assert abs(names[name] / 6000 - share) < 4 * (share * (1 - share) / 6000) ** 0.5


def test_a_size_whose_classes_have_no_weight_never_comes(cache):
    weights = {"shape/star": 1.0, "shape/disc": 0.0, "shape/ring": 0.0}
    reader = Reader(cache, batch_size=4, class_weights=weights, keys=[f"{n:09d}" for n in (0, 1, 2, 3, 6, 9)])
    sizes = {batch.size for batch in itertools.islice(reader.batches(), 20)}
    assert sizes == {size_of_number(n) for n in (0, 3, 6, 9)}


def test_another_order_of_the_same_sizes_keeps_the_blocks(cache):
    reader = Reader(cache, batch_size=5, workers=0)
    groups = [(steps > 500).astype(int) for steps in reader.timesteps_of_sizes]
    orders, _ = grouped_by_size(reader.seeds, reader.pairs_of_sizes, groups, np.array([1.0, 3.0]))
    other = SizedOrder(orders, reader.schedule)
    for batch, own in itertools.islice(zip(reader.batches(0, other), reader.batches(), strict=True), 10):
        assert batch.size == own.size


def test_rows_of_several_sizes_make_no_batch(cache):
    reader = Reader(cache, batch_size=2)
    with pytest.raises(ValueError, match="rows of 3 sizes in one batch: 24x48, 40x32, 48x24"):
        reader.batch(np.arange(20))


def test_moving_cutting_and_joining_keep_the_size(cache):
    from shards.batch import collate, concatenate

    first, second = itertools.islice(Reader(cache, batch_size=4, view=View(size=SIZES[1])).batches(), 2)
    assert first.to("cpu", torch.float32).size == first.rows(slice(1, 3)).size == SIZES[1]
    assert concatenate([first, second]).size == SIZES[1]
    assert collate([make_sized_record(0, SIZES[2])], [1]).size == SIZES[2]
    other = next(Reader(cache, batch_size=4, view=View(size=SIZES[2])).batches())
    with pytest.raises(ValueError, match="batches of 2 sizes"):
        concatenate([first, other])


def test_memory_is_taken_for_the_sizes_of_the_view_alone(cache):
    bytes_of = {size: Manifest.open(cache).totals("train", size).bytes for size in SIZES}
    budget = bytes_of[SIZES[1]]
    assert not Reader(cache, memory_budget_bytes=budget)._fits_memory
    assert Reader(cache, memory_budget_bytes=budget, view=View(size=SIZES[1]))._fits_memory


@pytest.mark.parametrize(
    ("sizes", "most"), [(1, MAX_OPEN_FILES), (3, 6 * WINDOW), (16, 32 * WINDOW), (99, 32 * WINDOW)]
)
def test_each_size_keeps_a_window_of_open_shards(cache, sizes, most):
    assert OpenShards(cache, sizes)._max_open == most


def test_a_record_is_found_by_its_key_in_whichever_size_it_has(cache):
    for number in range(TRAIN):
        assert Reader(cache).record(f"{number:09d}").x0.equal(make_sized_record(number, size_of_number(number)).x0)
