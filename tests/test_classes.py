"""Laws of the class selector."""

from pathlib import Path

import pytest

from configs.refusal import Refused
from stages.classes import ClassFile, ClassSpec, class_prompts, load_classes
from stages.prompts import GrammarSource, split_of

FILE = ClassFile(
    classes=(
        ClassSpec(name="stars", pattern="star/*", priority="top"),
        ClassSpec(name="hearts", pattern="heart/*", priority="mid"),
        ClassSpec(name="rings", pattern="ring/*", priority="low"),
    )
)


def test_quotas_sum_to_the_total_and_follow_the_weights() -> None:
    assert FILE.quotas(70) == {"stars": 40, "hearts": 20, "rings": 10}
    for total in range(5, 90):
        assert sum(FILE.quotas(total).values()) == total


def test_shares_sum_to_one() -> None:
    assert sum(FILE.weight(spec) for spec in FILE.classes) == pytest.approx(1)


def test_a_class_without_a_picture_is_refused_by_name() -> None:
    with pytest.raises(Refused, match="'rings' gets none of 2"):
        FILE.quotas(2)


def test_overlapping_patterns_are_refused_with_both_names() -> None:
    both = ClassFile(classes=(*FILE.classes, ClassSpec(name="reds", pattern="*/red", priority="low")))
    with pytest.raises(Refused, match="'stars' and 'reds' both claim 'star/red'"):
        both.owner("star/red")
    assert both.owner("star/blue") == FILE.classes[0]
    assert both.owner("moon/blue") is None


def test_each_class_gets_its_quota_of_prompts_of_its_own_split() -> None:
    found = class_prompts(SOURCE, 0, "train", FILE.classes, FILE.quotas(14))
    assert {name: len(prompts) for name, prompts in found.items()} == {"stars": 8, "hearts": 4, "rings": 2}
    assert all(prompt.class_name.startswith("star/") for prompt in found["stars"])
    assert all(split_of(prompt.text) == "train" for prompts in found.values() for prompt in prompts)


SOURCE = GrammarSource(grammar=Path("stages/tiny/grammar.yaml"))


def test_a_pattern_that_fits_nothing_is_refused_by_name() -> None:
    with pytest.raises(Refused, match="class 'cats': 0 of 1 prompts"):
        class_prompts(SOURCE, 0, "train", [ClassSpec(name="cats", pattern="cat/*", priority="top")], {"cats": 1})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("classes: []", "classes"),
        ("classes: [{name: a, pattern: '*', priority: highest}]", "priority"),
        ("classes: [{name: a, pattern: '*', priority: top}, {name: a, pattern: '*', priority: low}]", "listed twice"),
        ("classes: [{name: a, pattern: '*', priority: top, weigth: 3}]", "weigth"),
        ("classes: [", "classes.yaml"),
    ],
)
def test_a_wrong_class_file_is_refused_with_its_name_and_the_reason(tmp_path: Path, text: str, reason: str) -> None:
    file = tmp_path / "classes.yaml"
    file.write_text(text)
    with pytest.raises(Refused, match=reason):
        load_classes(file)
