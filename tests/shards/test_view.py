import itertools

import pytest
from pydantic import ValidationError

from shards.reader import Reader
from shards.stream.view import View, uniform_of_key
from stages.system.refusal import Refused


def samples_of_epoch(cache, view, **options):
    """(key, state) of every sample of one epoch."""
    reader = Reader(cache, view=view, batch_size=1, **options)
    batches = itertools.islice(reader.batches(), reader.samples_per_epoch)
    return sorted((batch.keys[0], int(batch.state_index[0])) for batch in batches)


def expected(make_record, keeps):
    records = [make_record(number) for number in range(7)]
    return [
        (record.key, state) for record in records for state in range(2) if keeps(record, float(record.states.s[state]))
    ]


@pytest.mark.parametrize("memory_budget_bytes", [2 << 30, 0])
@pytest.mark.parametrize(
    ("view", "keeps"),
    [
        (View(), lambda _record, _s: True),
        (View(classes="*/star"), lambda record, _s: record.class_name == "shape/star"),
        (View(s_range=(0.2, 0.7)), lambda _record, s: 0.2 <= s < 0.7),
        (View(guidance_range=(4, 6)), lambda record, _s: 4 <= record.guidance_scale <= 6),
        (View(classes="*/[sd]*", s_range=(0.5, 1)), lambda record, s: "ring" not in record.class_name and s >= 0.5),
        (View(prompt_fraction=0.6), lambda record, _s: uniform_of_key(record.key) < 0.6),
    ],
)
def test_a_view_holds_what_it_describes(cache, make_record, view, keeps, memory_budget_bytes):
    wanted = expected(make_record, keeps)
    assert len(wanted) > 0
    assert samples_of_epoch(cache, view, memory_budget_bytes=memory_budget_bytes) == wanted


def test_bins_of_s_tile_the_cache(cache):
    bins = [samples_of_epoch(cache, View(s_range=(i / 4, (i + 1) / 4))) for i in (1, 2, 3)]
    rest = samples_of_epoch(cache, View(s_range=(0.25, 1)))
    assert sorted(itertools.chain(*bins)) == rest


def test_a_smaller_share_of_prompts_lies_inside_a_larger():
    keys = [f"{number:09d}" for number in range(5000)]
    shares = [{key for key in keys if uniform_of_key(key) < fraction} for fraction in (0.1, 0.2, 1.0)]
    assert shares[0] < shares[1] < shares[2] == set(keys)
    assert abs(len(shares[0]) - 500) < 4 * (5000 * 0.1 * 0.9) ** 0.5


def test_weights_hold_inside_a_view(cache):
    weights = {"shape/star": 1.0, "shape/disc": 0.0}
    reader = Reader(cache, view=View(classes="*/[sd]*"), class_weights=weights, batch_size=20)
    assert set(next(reader.batches()).class_names) == {"shape/star"}


def test_an_empty_view_is_refused(cache):
    with pytest.raises(Refused, match=r"no sample of split train is in the view .*moon"):
        next(Reader(cache, view=View(classes="*/moon")).batches())


@pytest.mark.parametrize("words", [{"s_range": (0.5, 0.1)}, {"prompt_fraction": 0}, {"klass": "a"}])
def test_a_view_that_makes_no_sense_is_refused(words):
    with pytest.raises(ValidationError):
        View.model_validate(words)
