import numpy as np
import pytest

from shards.stream import order
from shards.stream.order import GroupedOrder, Pairs, ShuffledOrder, WeightedOrder
from stages.system.refusal import Refused

STATES = np.array([2, 2, 3, 1, 4])


def pairs_at(ordered, first, last):
    """The samples [first, last) of an order as (record, state)."""
    return list(zip(*(part.tolist() for part in ordered.at(np.arange(first, last))), strict=True))


def all_pairs():
    return sorted((record, state) for record, states in enumerate(STATES) for state in range(states))


def test_pairs_number_each_state_of_each_record_once():
    pairs = Pairs(STATES)
    assert len(pairs) == 12
    assert list(zip(*(part.tolist() for part in pairs.locate(np.arange(12))), strict=True)) == all_pairs()


@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_each_epoch_is_a_permutation(epoch):
    ordered = ShuffledOrder(3, Pairs(STATES))
    assert sorted(pairs_at(ordered, 12 * epoch, 12 * epoch + 12)) == all_pairs()


def test_epochs_and_seeds_differ():
    pairs = Pairs(np.full(100, 2))
    one = ShuffledOrder(3, pairs)
    assert pairs_at(one, 0, 200) != pairs_at(one, 200, 400)
    assert pairs_at(one, 0, 200) != pairs_at(ShuffledOrder(4, pairs), 0, 200)


def test_a_span_over_several_epochs_is_its_parts_put_together():
    ordered = ShuffledOrder(3, Pairs(STATES))
    assert pairs_at(ordered, 5, 40) == pairs_at(ordered, 5, 13) + pairs_at(ordered, 13, 40)


def test_the_order_of_seed_0_is_the_one_it_always_was():
    pairs, weights = Pairs(np.full(10, 1)), {"a": 1, "b": 1}
    uniform, weighted = ShuffledOrder(0, pairs), WeightedOrder(0, pairs, "ababababab", weights)
    assert uniform.at(np.arange(10))[0].tolist() == [4, 6, 2, 7, 3, 5, 9, 0, 8, 1]
    assert weighted.at(np.arange(10))[0].tolist() == [9, 8, 4, 5, 1, 5, 6, 4, 4, 2]


def test_every_pair_comes_first_equally_often():
    firsts = [ShuffledOrder(seed, Pairs(STATES)).at(np.arange(1)) for seed in range(2400)]
    counts = np.bincount([Pairs(STATES).starts[record[0]] + state[0] for record, state in firsts], minlength=12)
    assert (abs(counts - 200) < 4 * np.sqrt(200 * 11 / 12)).all()


CLASSES = ["a", "b", "a", "c", "b"]


def test_shares_of_classes_are_their_weights_within_three_standard_errors():
    n, weights = 20000, {"a": 5.0, "b": 3.0, "c": 2.0}
    records, _ = WeightedOrder(1, Pairs(STATES), CLASSES, weights).at(np.arange(n))
    for name, weight in weights.items():
        share, expected = np.mean([CLASSES[record] == name for record in records]), weight / 10
        assert abs(share - expected) < 3 * np.sqrt(expected * (1 - expected) / n)


def test_pairs_of_a_class_are_all_alike():
    n = 20000
    records, states = WeightedOrder(1, Pairs(STATES), CLASSES, {"a": 1, "b": 0, "c": 0}).at(np.arange(n))
    counts = np.bincount(Pairs(STATES).starts[records] + states, minlength=12)
    of_a = counts[[0, 1, 4, 5, 6]]
    assert of_a.sum() == n
    assert (abs(of_a - n / 5) < 4 * np.sqrt(n * 0.2 * 0.8)).all()


def test_a_class_of_weight_zero_never_comes():
    for weights in ({"a": 0, "b": 1, "c": 1}, {"a": 1, "b": 0, "c": 1}, {"a": 1, "b": 1, "c": 0}):
        records, _ = WeightedOrder(1, Pairs(STATES), CLASSES, weights).at(np.arange(5000))
        assert {CLASSES[record] for record in records} == {name for name, weight in weights.items() if weight}


def test_a_weighted_sample_depends_on_its_number_alone():
    ordered = WeightedOrder(1, Pairs(STATES), CLASSES, {"a": 5, "b": 3, "c": 2})
    whole = pairs_at(ordered, 4000, 9000)
    assert pairs_at(ordered, 4090, 4100) == whole[90:100]
    assert pairs_at(ordered, 8191, 8193) == whole[4191:4193]


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"a": 1, "b": 1}, "class c: has records and no weight"),
        ({"a": 1, "b": 1, "c": 1, "cc": 1}, "class cc: has a weight and no record - did you mean c"),
        ({"a": -1, "b": 1, "c": 1}, "class a: weight -1"),
        ({"a": 0, "b": 0, "c": 0}, "all are 0"),
    ],
)
def test_weights_that_do_not_fit_the_classes_are_refused(weights, words):
    with pytest.raises(Refused, match=words):
        WeightedOrder(1, Pairs(STATES), CLASSES, weights)


def test_rounding_never_draws_a_class_of_weight_zero(monkeypatch):
    # Eight tenths add up to a hair less than eight times a tenth: the greatest chance lies beyond the last boundary.
    monkeypatch.setattr(
        order, "chances", lambda _seed, _block: np.full((order.SAMPLES_PER_BLOCK, 2), np.nextafter(1, 0))
    )
    weights = dict.fromkeys("abcdefgh", 0.1) | {"z": 0.0}
    records, _ = WeightedOrder(1, Pairs(np.full(9, 1)), "abcdefghz", weights).at(np.arange(1))
    assert records.tolist() == [7]


def test_pairs_of_one_record_may_lie_in_different_groups():
    n, shares = 20000, np.array([1.0, 0.0, 3.0, 0.0])
    group_of_pair = np.array([0, 2, 1, 2, 0, 2, 1, 2, 0, 2, 1, 2])  # group 3 is empty, and the last
    records, states = GroupedOrder(1, Pairs(STATES), group_of_pair, shares).at(np.arange(n))
    counts = np.bincount(Pairs(STATES).starts[records] + states, minlength=12)
    expected = np.choose(group_of_pair, [n / 4 / 3, 0, 3 * n / 4 / 6, 0])
    assert (counts[expected == 0] == 0).all()
    assert (abs(counts - expected) <= 4 * np.sqrt(expected)).all()


@pytest.mark.parametrize("shares", [[1.0, 1.0], [1.0, -1.0]])
def test_a_group_without_pairs_cannot_be_drawn(shares):
    with pytest.raises(ValueError, match="positive with pairs"):
        GroupedOrder(1, Pairs(STATES), np.zeros(12, dtype=np.int64), np.array(shares))
