"""The order of one size is, bit for bit, the one that earlier versions trained by.

The digests were computed with the version before pictures had sizes, over [records, states] as JSON.
"""

import hashlib
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from shards.reader import Reader
from shards.stream.order import GroupedOrder, Pairs, ShuffledOrder, WeightedOrder
from shards.stream.schedule import SizedOrder, SizeSchedule

STATES = np.array([2, 2, 3, 1, 4])
PLACES = np.concatenate([np.arange(60), np.arange(4090, 4100), 10**9 + np.arange(5)])
ORDERS = {
    "shuffled": ShuffledOrder(3, Pairs(STATES)),
    "windows": ShuffledOrder(11, Pairs(np.array([1 + i % 3 for i in range(80)]), [2] * 40)),
    "masked": ShuffledOrder(5, Pairs(STATES, [2, 3], np.arange(12) % 3 != 1)),
    "weighted": WeightedOrder(1, Pairs(STATES), ["a", "b", "a", "c", "b"], {"a": 5, "b": 3, "c": 2}),
    "grouped": GroupedOrder(1, Pairs(STATES), np.array([0, 2, 1, 2] * 3), np.array([1.0, 0.0, 3.0, 0.0])),
}
DIGESTS = {
    "shuffled": "e215728a1f46b084d2c79a45b259d07771cba9fdb38a7481ceb3685559d2b9c6",
    "windows": "abb8d89b8999ed286b42b6250bccd99646aefb40185fa7f4534f1f4cf0ca0f0b",
    "masked": "751bd353ee173792e6ad5cf8075eded5c42140d132365ff4bd7b913c4b4ae396",
    "weighted": "4bfcebe01518209de6516f338b5095c6a6b91be035c73aee73726519ed885354",
    "grouped": "9a10aa144dded227d6dc7453aba61fab267dfcf8f03178d0457d5e920d99fb52",
}
READ = {
    (1, 0): "f0b2ebbd747a9aa97aba007664edcc4c2523e9d8603c83bb2779508c06f96b00",
    (2, 0): "af96201605ecd6f384a27ef4ae2e9a4eacfe64283f6b80342ea46df5f935cca6",
    (2, 1): "e2e0f933acfed5537ff1eabfc3660fafed3a428e4a3d9517b25a18aaf978b10d",
    (3, 0): "f1807a0ce5308d6b5426a129b3d0e6c783f5522efa73388150da750ef820f31e",
    (3, 1): "2d72217c3f43cf978487bf832a648830990b797fb38b5f105eb918efcc50f7b3",
    (3, 2): "307437d4565bd932b97acbd05c83dc78f35411cf65ff85b8e37ee426774481f2",
}
"""World and rank -> digest of (key, state) of four batches of three rows from sample 6 on."""


def digest(values: object) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


@pytest.mark.parametrize("name", ORDERS)
def test_an_order_is_the_one_that_it_was(name):
    for order in (ORDERS[name], SizedOrder([ORDERS[name]], SizeSchedule([len(ORDERS[name].pairs)], [7]))):
        assert digest([part.tolist() for part in order.at(PLACES)]) == DIGESTS[name]


@pytest.mark.parametrize(("world", "rank"), READ)
def test_a_cache_is_read_as_it_was(world, rank):
    reader = Reader(Path("tests/golden/data/cache"), seed=4, batch_size=3, rank=rank, world=world)
    batches = [
        [[key, int(state)] for key, state in zip(batch.keys, batch.state_index, strict=True)]
        for batch in itertools.islice(reader.batches(6), 4)
    ]
    assert digest(list(itertools.chain(*batches))) == READ[world, rank]
