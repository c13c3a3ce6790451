"""Laws of streams of several sizes: shares, permutations, and a function of the sample number alone."""

from fractions import Fraction
from itertools import islice, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.stream.order import GroupedOrder, Pairs, ShuffledOrder
from shards.stream.schedule import SizedOrder, SizeSchedule, grouped_by_size, seed_of_size

LAWS = settings(max_examples=60, deadline=None)
MIXES = st.lists(st.tuples(st.integers(1, 400), st.integers(1, 12)), min_size=1, max_size=8)
"""Samples, and rows of a block, of each size."""


def schedule_of(mix):
    return SizeSchedule(*zip(*mix, strict=True))


def share_of_blocks(mix):
    blocks = [Fraction(samples, rows) for samples, rows in mix]
    return [each / sum(blocks) for each in blocks]


@LAWS
@given(mix=MIXES)
def test_blocks_follow_each_other_and_are_counted_without_going_through_them(mix):
    schedule, counts, sample = schedule_of(mix), [0] * len(mix), 0
    for number, block in enumerate(islice(schedule.blocks(), 80)):
        assert schedule.counts(number) == counts
        assert (schedule.first_sample(number), schedule.size_of_block(number)) == (sample, block.size) == block[1::-1]
        assert block.rows == mix[block.size][1]
        assert {schedule.block_of(sample), schedule.block_of(sample + block.rows - 1)} == {number}
        assert schedule.boundary(sample) == sample
        assert schedule.boundary(sample + 1) == sample + block.rows
        counts[block.size] += 1
        sample += block.rows


@LAWS
@given(mix=MIXES, blocks=st.integers(0, 10**9))
def test_no_size_is_far_from_its_share_of_the_blocks(mix, blocks):
    halvings = (len(mix) - 1).bit_length()
    most = Fraction(halvings, 2)
    counts = schedule_of(mix).counts(blocks)
    off = [abs(count - blocks * share) for count, share in zip(counts, share_of_blocks(mix), strict=True)]
    assert max(off) <= most
    assert halvings < 2 or max(off) < most
    assert sum(counts) == blocks


@LAWS
@given(mix=MIXES, times=st.integers(1, 10**6))
def test_shares_come_out_exactly_where_they_are_whole_blocks(mix, times):
    shares = share_of_blocks(mix)
    whole = times * np.lcm.reduce(np.array([share.denominator for share in shares], dtype=object))
    schedule = schedule_of(mix)
    assert schedule.counts(whole) == [whole * share for share in shares]
    total = sum(samples for samples, _ in mix)
    first = schedule.first_sample(whole)
    assert [count * rows for count, (_, rows) in zip(schedule.counts(whole), mix, strict=True)] == [
        Fraction(first * samples, total) for samples, _ in mix
    ]


@LAWS
@given(mix=MIXES, start=st.integers(0, 10**15))
def test_the_blocks_from_any_boundary_on_are_the_tail_of_the_stream(mix, start):
    schedule = schedule_of(mix)
    first = schedule.boundary(start)
    tail = list(islice(schedule.blocks(first), 12))
    assert all(block.first + block.rows == after.first for block, after in pairwise(tail))
    assert list(islice(schedule.blocks(tail[5].first), 7)) == tail[5:]


@pytest.mark.parametrize("sample", [1, 3, 7, 10**12 + 1])
def test_a_start_inside_a_block_is_refused(sample):
    schedule = SizeSchedule([30, 20], [4, 4])
    with pytest.raises(ValueError, match=f"sample {sample} is {sample % 4} rows into a batch"):
        next(schedule.blocks(sample))


def test_blocks_of_one_size_may_begin_anywhere():
    assert [block.first for block in islice(SizeSchedule([30], [4]).blocks(7), 3)] == [7, 11, 15]


@LAWS
@given(mix=MIXES, order=st.randoms())
def test_places_of_samples_do_not_depend_on_what_else_is_looked_up(mix, order):
    schedule, samples = schedule_of(mix), list(range(60))
    sizes, places = schedule.at(np.arange(60))
    order.shuffle(samples)
    for sample in samples:
        one = schedule.at(np.array([sample]))
        assert (one[0][0], one[1][0]) == (sizes[sample], places[sample])
    for size in range(len(mix)):
        assert places[sizes == size].tolist() == list(range((sizes == size).sum()))


@settings(max_examples=25, deadline=None)
@given(mix=MIXES, seed=st.integers(0, 5))
def test_each_epoch_of_a_size_is_a_permutation_of_its_pairs(mix, seed):
    pairs = [Pairs(np.full(samples, 1)) for samples, _ in mix]
    order = SizedOrder([ShuffledOrder(seed, of_size) for of_size in pairs], schedule_of(mix))
    total = sum(samples for samples, _ in mix) + sum(rows for _, rows in mix)
    sizes, _ = order.schedule.at(np.arange(2 * total))
    records, _ = order.at(np.arange(2 * total))
    for size, (samples, _) in enumerate(mix):
        stream = records[sizes == size]
        for first in range(0, len(stream) - samples + 1, samples):
            assert sorted(stream[first : first + samples].tolist()) == list(range(samples))


def test_one_size_is_the_order_of_that_size():
    pairs, samples = Pairs(np.array([2, 2, 3, 1, 4])), np.concatenate([np.arange(60), 10**9 + np.arange(5)])
    alone = ShuffledOrder(3, pairs)
    for one, other in zip(SizedOrder([alone], SizeSchedule([12], [5])).at(samples), alone.at(samples), strict=True):
        assert one.tolist() == other.tolist()


def test_a_size_without_samples_never_comes():
    schedule = SizeSchedule([0.0, 0.25, 0.75], [4, 4, 4])
    assert {block.size for block in islice(schedule.blocks(), 100)} == {1, 2}
    with pytest.raises(ValueError, match="every size that comes should have an order"):
        SizedOrder([None, None, ShuffledOrder(0, Pairs(np.array([4])))], schedule)


GROUPS = (np.array([0, 0, 1, 2, 2, 2]), np.array([1, 1, 1, 0]), np.array([2, 2]))
SHARES = np.array([5.0, 1.0, 4.0, 0.0])


def joint_counts(orders, sizes, places):
    """Samples of each group in each size."""
    counts = np.zeros((len(orders), len(SHARES)))
    for number, order in enumerate(orders):
        pair, _ = order.at(places[sizes == number])
        np.add.at(counts[number], GROUPS[number][pair], 1)
    return counts


@pytest.fixture(scope="module")
def pairs_of_sizes():
    return [Pairs(np.full(len(groups), 1)) for groups in GROUPS]


def test_shares_of_groups_come_out_jointly_over_all_sizes(pairs_of_sizes):
    n, seeds = 40000, [seed_of_size(1, size) for size in range(3)]
    orders, of_size = grouped_by_size(seeds, pairs_of_sizes, GROUPS, SHARES)
    assert of_size == pytest.approx([0.5 * 2 / 3 + 0.1 / 4 + 0.4 * 3 / 5, 0.5 / 3 + 0.1 * 3 / 4, 0.4 * 2 / 5])
    sizes, places = SizeSchedule(of_size.tolist(), [4, 4, 8]).at(np.arange(n))
    counts = joint_counts(orders, sizes, places)
    sampled, wanted = counts.sum(axis=0) / n, SHARES / SHARES.sum()
    assert (abs(sampled - wanted) <= 4 * np.sqrt(wanted * (1 - wanted) / n)).all()
    # A group's samples are spread over the sizes as its pairs are.
    assert counts[:, 0] / counts[:, 0].sum() == pytest.approx([2 / 3, 1 / 3, 0], abs=0.02)


def test_weights_by_the_normaliser_of_a_size_give_back_the_measure_of_the_pairs(pairs_of_sizes):
    """Sizes come by their pairs, groups by another q: pi / q times W_z N / N_z makes every pair count alike."""
    n, pairs = 40000, np.array([6, 4, 2])
    stored = np.array([3.0, 4.0, 5.0, 0.0])
    q = np.array([6.0, 1.0, 3.0, 0.0])
    orders, normaliser = grouped_by_size([1, 2, 3], pairs_of_sizes, GROUPS, q)
    sizes, places = SizeSchedule(pairs.tolist(), [4, 4, 4]).at(np.arange(n))
    counts = joint_counts(orders, sizes, places)
    pi, q = stored / stored.sum(), q / q.sum()
    weights = np.divide(pi, q, out=np.zeros(4), where=q > 0) * (normaliser * pairs.sum() / pairs)[:, None]
    in_size = np.stack([np.bincount(groups, minlength=4) for groups in GROUPS])
    assert (counts * weights / n) == pytest.approx(in_size / pairs.sum(), abs=0.015)


def test_one_size_has_the_groups_as_they_are(pairs_of_sizes):
    orders, normaliser = grouped_by_size([1], pairs_of_sizes[:1], GROUPS[:1], SHARES)
    alone, samples = GroupedOrder(1, pairs_of_sizes[0], GROUPS[0], SHARES), np.arange(5000)
    assert normaliser.tolist() == [1.0]
    assert orders[0].at(samples)[0].tolist() == alone.at(samples)[0].tolist()


def test_a_size_of_groups_without_a_share_has_no_order(pairs_of_sizes):
    orders, normaliser = grouped_by_size([1, 2, 3], pairs_of_sizes, GROUPS, np.array([1.0, 1.0, 0.0, 0.0]))
    assert orders[2] is None
    assert normaliser[2] == 0


def test_sizes_do_not_take_their_chances_together():
    assert len({seed_of_size(seed, size) for seed in range(3) for size in ("64x64", "64x96", "96x64")}) == 9
