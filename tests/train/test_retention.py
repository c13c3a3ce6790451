"""Which checkpoints are kept, over any sequence of saves."""

from hypothesis import given
from hypothesis import strategies as st

from stages.train.checkpoint_store import KeepConfig, checkpoints_to_keep

SCORES = st.none() | st.sampled_from([0.1, 0.2, 0.3, 0.4])
SAVES = st.dictionaries(st.integers(0, 60), SCORES, min_size=1)
KEEP = st.builds(KeepConfig, last=st.integers(1, 4), every_samples=st.none() | st.integers(1, 20))


@given(SAVES, KEEP)
def test_the_last_the_best_and_one_of_each_interval_are_kept(saves, keep):
    every = keep.every_samples
    measured = {samples: score for samples, score in saves.items() if score is not None}
    last = {n for n in saves if sum(other > n for other in saves) < keep.last}
    best = {n for n in measured if all((measured[n], n) <= (score, other) for other, score in measured.items())}
    first = {n for n in saves if every and n >= every and not any(other in saves for other in range(n - n % every, n))}
    assert checkpoints_to_keep(saves, keep) == last | best | first


@given(SAVES, KEEP)
def test_deciding_after_every_save_leaves_what_deciding_once_leaves(saves, keep):
    here = {}
    for samples in sorted(saves):
        here[samples] = saves[samples]
        here = {n: here[n] for n in checkpoints_to_keep(here, keep)}
        assert samples in here
    assert here.keys() == checkpoints_to_keep(saves, keep)


@given(SAVES, KEEP)
def test_keeping_is_idempotent(saves, keep):
    kept = checkpoints_to_keep(saves, keep)
    assert checkpoints_to_keep({n: saves[n] for n in kept}, keep) == kept


@given(SAVES, st.integers(1, 4), st.integers(1, 20))
def test_keeping_more_never_deletes_more(saves, last, every):
    few, more = KeepConfig(last=last), KeepConfig(last=last + 1, every_samples=every)
    assert checkpoints_to_keep(saves, few) <= checkpoints_to_keep(saves, more)


@given(SAVES)
def test_no_more_are_kept_than_configured(saves):
    assert len(checkpoints_to_keep(saves, KeepConfig(last=2))) <= 3


def test_the_best_survives_and_the_earlier_of_two_equals_is_it():
    saves = {8: 0.3, 16: 0.1, 24: None, 32: 0.1, 40: 0.2}
    assert checkpoints_to_keep(saves, KeepConfig(last=1)) == {16, 40}


def test_an_interval_keeps_its_first_checkpoint_whether_or_not_it_met_the_multiple():
    saves = dict.fromkeys([6, 12, 22, 28, 40])
    assert checkpoints_to_keep(saves, KeepConfig(last=1, every_samples=10)) == {12, 22, 40}
