"""Laws of the selection: quotas, prompts and sampling weights of the classes."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.stream.order import Pairs, WeightedOrder
from stages.classes.selection import (
    expected_samples,
    owner_of_record,
    picture_quotas,
    prior_sampling_weights,
    sampling_weights,
    search_prompts,
)
from stages.classes.specification import ClassFile, ClassSpec
from stages.prompts import GrammarSource, split_of
from stages.system.refusal import Refused

SOURCE = GrammarSource(grammar=Path("stages/tiny/grammar.yaml"))
FILE = ClassFile(
    classes=(
        ClassSpec(name="stars", pattern="star/*", priority="top"),
        ClassSpec(name="hearts", pattern="heart/*", priority="mid"),
        ClassSpec(name="rings", pattern="ring/*", priority="low"),
    )
)


def of(*patterns: str, **more: object) -> ClassFile:
    """A file of top classes that are called as their patterns are."""
    return ClassFile.model_validate(
        {"classes": [{"name": p, "pattern": p, "priority": "top", **more} for p in patterns]}
    )


@st.composite
def class_files(draw: st.DrawFn) -> ClassFile:
    specs = draw(
        st.lists(
            st.fixed_dictionaries(
                {"priority": st.sampled_from(["top", "mid", "low"])},
                optional={"weight": st.floats(0.1, 10), "pictures": st.integers(1, 20)},
            ),
            min_size=1,
            max_size=6,
        )
    )
    return ClassFile.model_validate(
        {"classes": [{"name": str(i), "pattern": f"{i}/*", **spec} for i, spec in enumerate(specs)]}
    )


def test_quotas_follow_the_weights() -> None:
    assert picture_quotas(FILE, 70) == {"stars": 40, "hearts": 20, "rings": 10}


@given(class_files(), st.integers(1, 400))
def test_quotas_sum_to_the_total_keep_fixed_numbers_and_are_within_one_of_the_exact_share_or_are_refused(
    classes: ClassFile, total: int
) -> None:
    try:
        quotas = picture_quotas(classes, total)
    except Refused:
        return
    assert sum(quotas.values()) == total
    fixed = {spec.name: spec.pictures for spec in classes.classes if spec.pictures}
    assert fixed.items() <= quotas.items()
    sharing = [spec for spec in classes.classes if not spec.pictures]
    whole, left = sum(map(classes.relative_weight, sharing)), total - sum(fixed.values())
    assert all(abs(quotas[spec.name] - left * classes.relative_weight(spec) / whole) < 1 for spec in sharing)
    assert min(quotas.values()) > 0


def test_a_class_without_a_picture_is_refused_by_name() -> None:
    with pytest.raises(Refused, match="'rings' gets none of 2"):
        picture_quotas(FILE, 2)


def test_more_fixed_pictures_than_the_total_are_refused_with_both_numbers() -> None:
    with pytest.raises(Refused, match=r"ask for 20 pictures \(a 10, b 10\), count is 15 - set count to 20"):
        picture_quotas(of("a", "b", pictures=10), 15)
    with pytest.raises(Refused, match="count is 21"):
        picture_quotas(of("a", "b", pictures=10), 21)
    assert picture_quotas(of("a", "b", pictures=10), 20) == {"a": 10, "b": 10}


def test_each_class_gets_its_quota_of_prompts_of_its_own_split() -> None:
    prompts_by_class = search_prompts(SOURCE, 0, "train", FILE, picture_quotas(FILE, 14)).prompts
    assert {name: len(prompts) for name, prompts in prompts_by_class.items()} == {"stars": 8, "hearts": 4, "rings": 2}
    assert all(prompt.class_name.startswith("star/") for prompt in prompts_by_class["stars"])
    assert all(split_of(prompt.text) == "train" for prompts in prompts_by_class.values() for prompt in prompts)


def test_a_larger_quota_begins_with_the_smaller_one() -> None:
    few, many = (search_prompts(SOURCE, 0, "train", FILE, picture_quotas(FILE, total)).prompts for total in (14, 28))
    assert all(many[name][: len(prompts)] == prompts for name, prompts in few.items())


def test_a_prompt_counts_for_its_owner_alone() -> None:
    nested = of("star/*", "star/red")
    search = search_prompts(SOURCE, 0, "train", nested, {"star/*": 5, "star/red": 5})
    assert {prompt.class_name for prompt in search.prompts["star/red"]} == {"star/red"}
    assert "star/red" not in {prompt.class_name for prompt in search.prompts["star/*"]}


def test_pictures_of_a_class_with_tags_keep_their_class_in_the_cache() -> None:
    left = ClassSpec(name="left", pattern="star/*", tags={"place": "left"}, priority="low")
    classes = ClassFile(classes=(FILE.classes[0], left))
    prompts_by_class = search_prompts(SOURCE, 0, "train", classes, {"stars": 6, "left": 6}).prompts
    assert all("at the left" in prompt.text for prompt in prompts_by_class["left"])
    assert not any("at the left" in prompt.text for prompt in prompts_by_class["stars"])
    for name, prompts in prompts_by_class.items():
        owners = [owner_of_record(classes, prompt.class_name) for prompt in prompts]
        assert {owner.name for owner in owners if owner} == {name}


@pytest.mark.parametrize(
    ("classes", "reason"),
    [
        (of("cat/*"), r"class 'cat/\*': 0 of 1 prompts found .* fits none of the class names there"),
        (of("star/*", *(f"star/{colour}*" for colour in "roygcbpl")), r"class 'star/\*': 0 .* owns all that fits star"),
        (ClassFile(classes=(ClassSpec(name="up", tags={"place": "up"}, priority="top"),)), "'up': .* fits place=up"),
    ],
)
def test_an_empty_class_is_refused_by_name_with_the_reason(
    classes: ClassFile, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.classes.selection.BASE_SEARCH_LIMIT", 300)
    with pytest.raises(Refused, match=reason):
        search_prompts(SOURCE, 0, "train", classes, {spec.name: 1 for spec in classes.classes})


@given(class_files(), st.integers(0, 10**6))
def test_expected_samples_are_exact_and_sum_to_the_total(classes: ClassFile, total: int) -> None:
    expected = expected_samples(classes, total)
    assert sum(expected.values()) == total
    assert {n: float(e) for n, e in expected.items()} == pytest.approx(
        {spec.name: total * classes.sampling_share(spec) for spec in classes.classes}
    )


def test_sampled_shares_are_the_expected_ones_within_three_standard_errors_and_the_order_is_a_function() -> None:
    classes = ClassFile(classes=(*FILE.classes[:2], FILE.classes[2].model_copy(update={"weight": 0.5})))
    names = ["star/red"] * 3 + ["star/blue"] * 40 + ["heart/red"] * 5 + ["ring/red"] * 90 + ["moon/red"] * 7
    order = WeightedOrder(3, Pairs(np.full(len(names), 2)), names, sampling_weights(classes, Counter(names)))
    n = 20_000
    records, states = order.at(np.arange(n))
    counts = Counter(owner.name if (owner := classes.owner(names[record])) else "none" for record in records.tolist())
    for name, expected in expected_samples(classes, n).items():
        p = float(expected) / n
        assert abs(counts[name] - n * p) < 3 * (n * p * (1 - p)) ** 0.5
    assert counts["none"] == 0
    later, _ = order.at(np.arange(n - 100, n))
    assert (later == records[-100:]).all()
    of_stars = Counter(record for record in records.tolist() if record < 43)
    assert max(of_stars.values()) < 2 * min(of_stars.values()), "records of a class have equal shares"
    assert set(states.tolist()) == {0, 1}


def test_a_class_without_a_record_is_refused_by_name() -> None:
    with pytest.raises(Refused, match="class 'rings': no record among 2 fits ring"):
        sampling_weights(FILE, Counter(["star/red", "heart/red"]))


def test_a_prior_class_gives_its_share_to_the_records_that_match_it() -> None:
    names = ["moon/red"] * 3 + ["moon/blue"] + ["ring/red"] * 4
    of_moons = FILE.classes[0].model_copy(update={"prior_class": "moon/*"})
    weights = prior_sampling_weights(ClassFile(classes=(of_moons, *FILE.classes[1:])), lambda: names)
    stars, rest = 4 / 7, 3 / 7
    assert weights == pytest.approx(
        {
            "moon/red": stars * 3 / 4 + rest * 3 / 8,
            "moon/blue": stars / 4 + rest / 8,
            "ring/red": rest / 2,
        }
    )
    with pytest.raises(Refused, match=r"'stars': prior_class moon/\* fits no record"):
        prior_sampling_weights(ClassFile(classes=(of_moons,)), lambda: ["ring/red"])


def test_without_a_prior_class_the_prior_is_not_read() -> None:
    def never() -> list[str]:
        raise AssertionError("called")

    assert prior_sampling_weights(FILE, never) is None


def test_a_class_of_photographs_alone_owns_no_prompt_and_has_no_quota(tmp_path: Path) -> None:
    classes = ClassFile(
        classes=(*FILE.classes, ClassSpec(name="zorks", priority="top", images=tmp_path, caption="a zork"))
    )
    assert picture_quotas(classes, 70) == {"stars": 40, "hearts": 20, "rings": 10, "zorks": 0}
    assert picture_quotas(ClassFile(classes=classes.classes[-1:]), 70) == {"zorks": 0}
    assert not classes.classes[-1].claims("star/red")
    assert owner_of_record(classes, "photograph@zorks") == classes.classes[-1]
    assert search_prompts(SOURCE, 0, "train", classes, picture_quotas(classes, 7)).prompts["zorks"] == []
