"""Laws of the class selector."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.order import Pairs, WeightedOrder
from stages.classes import (
    ClassFile,
    ClassSpec,
    class_prompts,
    expected_samples,
    load_classes,
    picture_quotas,
    prior_sampling_weights,
    sampling_weights,
    search_prompts,
)
from stages.classes.selection import owner_of_record
from stages.classes.specification import specificity
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


# Quotas


def test_quotas_follow_the_weights() -> None:
    assert picture_quotas(FILE, 70) == {"stars": 40, "hearts": 20, "rings": 10}


@given(class_files(), st.integers(1, 400))
def test_quotas_sum_to_the_total_keep_what_is_told_and_lie_within_one_of_the_exact_share_or_are_refused(
    classes: ClassFile, total: int
) -> None:
    try:
        found = picture_quotas(classes, total)
    except Refused:
        return
    assert sum(found.values()) == total
    told = {spec.name: spec.pictures for spec in classes.classes if spec.pictures}
    assert told.items() <= found.items()
    sharing = [spec for spec in classes.classes if not spec.pictures]
    whole, left = sum(map(classes.relative_weight, sharing)), total - sum(told.values())
    assert all(abs(found[spec.name] - left * classes.relative_weight(spec) / whole) < 1 for spec in sharing)
    assert min(found.values()) > 0


def test_a_class_without_a_picture_is_refused_by_name() -> None:
    with pytest.raises(Refused, match="'rings' gets none of 2"):
        picture_quotas(FILE, 2)


def test_more_pictures_told_than_there_are_is_refused_with_both_numbers() -> None:
    with pytest.raises(Refused, match=r"ask for 20 pictures \(a 10, b 10\), count is 15 - set count to 20"):
        picture_quotas(of("a", "b", pictures=10), 15)
    with pytest.raises(Refused, match="count is 21"):
        picture_quotas(of("a", "b", pictures=10), 21)
    assert picture_quotas(of("a", "b", pictures=10), 20) == {"a": 10, "b": 10}


# Who owns a prompt


def test_what_says_more_is_more_specific() -> None:
    rising = ["*", "?*", "[a-z]*", "s*", "star*", "*/*", "s*/*", "star/*", "star/[a-m]*", "star/r*", "star/red"]
    assert [specificity(pattern) for pattern in rising] == sorted(map(specificity, rising))
    assert len({specificity(pattern) for pattern in rising}) == len(rising)


def test_how_long_a_word_is_spelt_decides_nothing() -> None:
    assert specificity("star/*") == specificity("*/red") == specificity("hourglass/*")


@given(st.lists(st.sampled_from("ab?*/"), min_size=1, max_size=8), st.data())
def test_telling_a_letter_in_place_of_a_wildcard_makes_a_pattern_more_specific(
    pattern: list[str], data: st.DataObject
) -> None:
    wild = [i for i, letter in enumerate(pattern) if letter in "?*"]
    if wild:
        told = list(pattern)
        told[data.draw(st.sampled_from(wild))] = "a"
        assert specificity("".join(told)) > specificity("".join(pattern))


def test_an_escaped_letter_counts_as_the_letter() -> None:
    assert specificity("star/[*]") == specificity("star/a") > specificity("star/*")


def test_the_most_specific_class_owns_a_prompt_in_whatever_order_they_are_listed() -> None:
    patterns = ("animal/*", "animal/*fox", "animal/arctic-fox", "*")
    owned = {"animal/arctic-fox": "animal/arctic-fox", "animal/red-fox": "animal/*fox", "animal/cat": "animal/*"}
    for classes in (of(*patterns), of(*reversed(patterns))):
        assert {name: owner.name for name in owned if (owner := classes.owner(name))} == owned
        assert (everything := classes.owner("food/cake"))
        assert everything.name == "*"


def test_a_tie_is_refused_with_both_names_and_what_both_claim() -> None:
    both = of("star/*", "*/red")
    with pytest.raises(Refused, match=r"'star/\*' .* and '\*/red' .* both claim 'star/red'"):
        both.owner("star/red")
    assert both.owner("star/blue") == both.classes[0]
    assert both.owner("moon/blue") is None


def test_a_tie_that_a_narrower_class_settles_is_none() -> None:
    settled = of("star/*", "*/red", "star/red").owner("star/red")
    assert settled
    assert settled.name == "star/red"


def test_tags_are_what_the_grammar_chose_and_count_as_much_as_parts() -> None:
    left = ClassSpec(name="left", tags={"place": "left"}, priority="top")
    assert left.claims("star/red", {"place": "left"})
    assert not left.claims("star/red", {"place": "right"})
    assert not left.claims("star/red")
    both = ClassSpec(name="left stars", pattern="star/*", tags={"place": "left"}, priority="top")
    assert both.specificity > left.specificity
    assert not both.claims("moon/red", {"place": "left"})
    said = {"place": "left", "colour": "red"}
    assert ClassFile(classes=(both, of("star/red").classes[0])).owner("star/red", said) == both
    as_much = ClassSpec(name="left reds", tags=said, priority="top")
    with pytest.raises(Refused, match=r"'left reds' .* both claim 'star/red'"):
        ClassFile(classes=(of("star/red").classes[0], as_much)).owner("star/red", said)


# Prompts


def test_each_class_gets_its_quota_of_prompts_of_its_own_split() -> None:
    found = class_prompts(SOURCE, 0, "train", FILE, picture_quotas(FILE, 14))
    assert {name: len(prompts) for name, prompts in found.items()} == {"stars": 8, "hearts": 4, "rings": 2}
    assert all(prompt.class_name.startswith("star/") for prompt in found["stars"])
    assert all(split_of(prompt.text) == "train" for prompts in found.values() for prompt in prompts)


def test_a_larger_quota_begins_with_the_smaller_one() -> None:
    few, many = (class_prompts(SOURCE, 0, "train", FILE, picture_quotas(FILE, total)) for total in (14, 28))
    assert all(many[name][: len(prompts)] == prompts for name, prompts in few.items())


def test_an_owned_prompt_counts_for_nobody_else() -> None:
    nested = of("star/*", "star/red")
    found = search_prompts(SOURCE, 0, "train", nested, {"star/*": 5, "star/red": 5})
    assert {prompt.class_name for prompt in found.prompts["star/red"]} == {"star/red"}
    assert "star/red" not in found.class_names["star/*"]


def test_pictures_of_a_class_told_by_tags_are_still_known_in_the_cache() -> None:
    left = ClassSpec(name="left", pattern="star/*", tags={"place": "left"}, priority="low")
    classes = ClassFile(classes=(FILE.classes[0], left))
    found = class_prompts(SOURCE, 0, "train", classes, {"stars": 6, "left": 6})
    assert all("at the left" in prompt.text for prompt in found["left"])
    assert not any("at the left" in prompt.text for prompt in found["stars"])
    for name, prompts in found.items():
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
        class_prompts(SOURCE, 0, "train", classes, {spec.name: 1 for spec in classes.classes})


# Draws


@given(class_files(), st.integers(0, 10**6))
def test_expected_draws_are_exact_and_sum_to_the_draws(classes: ClassFile, draws: int) -> None:
    found = expected_samples(classes, draws)
    assert sum(found.values()) == draws
    assert {n: float(e) for n, e in found.items()} == pytest.approx(
        {spec.name: draws * classes.sampling_share(spec) for spec in classes.classes}
    )


def test_drawn_shares_are_the_expected_ones_within_three_standard_errors_and_the_order_is_a_function() -> None:
    classes = ClassFile(classes=(*FILE.classes[:2], FILE.classes[2].model_copy(update={"weight": 0.5})))
    names = ["star/red"] * 3 + ["star/blue"] * 40 + ["heart/red"] * 5 + ["ring/red"] * 90 + ["moon/red"] * 7
    order = WeightedOrder(3, Pairs(np.full(len(names), 2)), names, sampling_weights(classes, Counter(names)))
    n = 20_000
    records, draws = order.at(np.arange(n))
    drawn = Counter(owner.name if (owner := classes.owner(names[record])) else "none" for record in records.tolist())
    for name, expected in expected_samples(classes, n).items():
        p = float(expected) / n
        assert abs(drawn[name] - n * p) < 3 * (n * p * (1 - p)) ** 0.5
    assert drawn["none"] == 0
    later, _ = order.at(np.arange(n - 100, n))
    assert (later == records[-100:]).all()
    of_stars = Counter(record for record in records.tolist() if record < 43)
    assert max(of_stars.values()) < 2 * min(of_stars.values()), "records of a class are drawn alike"
    assert set(draws.tolist()) == {0, 1}


def test_a_class_without_a_record_is_refused_by_name() -> None:
    with pytest.raises(Refused, match="class 'rings': no record among 2 fits ring"):
        sampling_weights(FILE, Counter(["star/red", "heart/red"]))


def test_a_prior_class_brings_its_share_to_the_records_that_fit_it() -> None:
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


def test_without_a_prior_class_the_prior_is_not_even_looked_at() -> None:
    def never() -> list[str]:
        raise AssertionError("asked")

    assert prior_sampling_weights(FILE, never) is None


# The file


def test_a_file_without_the_optional_keys_keeps_the_fingerprint_that_painted_caches_carry() -> None:
    shapes = {"top": ("star", "hourglass"), "mid": ("heart", "moon"), "low": ("ring", "circle")}
    plural = {"hourglass": "hourglasses"}
    specs = [
        ClassSpec(name=plural.get(shape, f"{shape}s"), pattern=f"{shape}/*", priority=priority)
        for priority, listed in shapes.items()
        for shape in listed
    ]
    classes = ClassFile(classes=tuple(specs))
    assert classes.sha256() == "bf521feddd748ced88d6a411f167dc8a193d566267577fdb9e83be80e6f36b4d"
    assert classes.model_copy(update={"classes": classes.classes[:2]}).sha256() != classes.sha256()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("classes: []", "classes"),
        ("[1, 2]", "dictionary"),
        ("classes: [{name: a, pattern: '*', priority: highest}]", "class 'a': priority"),
        ("classes: [{name: a, pattern: '*', priority: top}, {name: a, pattern: '*', priority: low}]", "listed twice"),
        (
            "classes: [{name: a, pattern: '*', priority: top, weigth: 3}]",
            "weigth: 3: unknown key - did you mean weight",
        ),
        ("classes: [{name: a, pattern: '*', priority: top, weight: -1}]", "class 'a': weight: .*greater than 0"),
        ("classes: [{name: a, pattern: '*', priority: top, weight: .inf}]", "class 'a': weight: .*finite"),
        ("classes: [{name: a, pattern: '*', priority: top, pictures: 0}]", "class 'a': pictures"),
        ("classes: [{name: a, priority: top}]", "class 'a': no pattern and no tags"),
        ("classes: [{pattern: '*', priority: top}]", "class number 1: name"),
        ("weights: {top: 1}\nclasses: [{name: a, pattern: '*', priority: low}]", "'low' of class 'a' has no positive"),
        ("classes: [", "classes.yaml"),
        ("classes: [{name: a, pattern: '*', priority: top}]\nclasses: []", "classes.yaml:2: .*said twice"),
        (
            "classes: [{name: a, pattern: '*', priority: top, weight: 1.0e308}, "
            "{name: b, pattern: b, priority: low, weight: 1.0e308}]",
            "no finite sum",
        ),
        ("classes: [{name: a, pattern: '*', priority: top, images: ~nobody-here/x}]", "no user 'nobody-here'"),
    ],
)
def test_a_wrong_class_file_is_refused_in_one_line_with_its_name_and_the_reason(
    tmp_path: Path, text: str, reason: str
) -> None:
    file = tmp_path / "classes.yaml"
    file.write_text(text)
    with pytest.raises(Refused, match=reason) as refusal:
        load_classes(file)
    assert "\n" not in str(refusal.value)
    assert str(file) in str(refusal.value)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "classes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(Refused, match=r"classes\.yaml"):
        load_classes(tmp_path / "classes.yaml")


# Photographs


def test_a_class_of_nothing_but_photographs_owns_no_prompt_and_gets_none_painted(tmp_path: Path) -> None:
    classes = ClassFile(
        classes=(*FILE.classes, ClassSpec(name="zorks", priority="top", images=tmp_path, caption="a zork"))
    )
    assert picture_quotas(classes, 70) == {"stars": 40, "hearts": 20, "rings": 10, "zorks": 0}
    assert picture_quotas(ClassFile(classes=classes.classes[-1:]), 70) == {"zorks": 0}
    assert not classes.classes[-1].claims("star/red")
    assert owner_of_record(classes, "photograph@zorks") == classes.classes[-1]
    assert class_prompts(SOURCE, 0, "train", classes, picture_quotas(classes, 7))["zorks"] == []


def test_where_photographs_lie_does_not_count_and_their_caption_does(tmp_path: Path) -> None:
    def fingerprint(folder: str, caption: str) -> str:
        spec = ClassSpec(name="zorks", priority="top", images=tmp_path / folder, caption=caption)
        return ClassFile(classes=(spec,)).sha256()

    assert fingerprint("one", "a zork") == fingerprint("other", "a zork") != fingerprint("one", "a blip")


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("priority: top", "no pattern and no tags"),
        ("priority: top, images: own, pictures: 3", "pictures without a pattern or tags"),
        ("priority: top, pattern: a, caption: a zork", "caption without images"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_the_class(said: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "classes.yaml").write_text(f"classes: [{{name: zorks, {said}}}]")
    with pytest.raises(Refused, match=f"class 'zorks': {told}"):
        load_classes(tmp_path / "classes.yaml")
