"""Laws of the class file: which class owns a prompt, and what is refused."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.classes.specification import ClassFile, ClassSpec, load_classes, specificity
from stages.system.refusal import Refused


def of(*patterns: str, **more: object) -> ClassFile:
    """A file of top classes that are called as their patterns are."""
    return ClassFile.model_validate(
        {"classes": [{"name": p, "pattern": p, "priority": "top", **more} for p in patterns]}
    )


def test_more_specific_globs_compare_greater() -> None:
    rising = ["*", "?*", "[a-z]*", "s*", "star*", "*/*", "s*/*", "star/*", "star/[a-m]*", "star/r*", "star/red"]
    assert [specificity(pattern) for pattern in rising] == sorted(map(specificity, rising))
    assert len({specificity(pattern) for pattern in rising}) == len(rising)


def test_the_length_of_a_word_decides_nothing() -> None:
    assert specificity("star/*") == specificity("*/red") == specificity("hourglass/*")


@given(st.lists(st.sampled_from("ab?*/"), min_size=1, max_size=8), st.data())
def test_a_letter_in_place_of_a_wildcard_makes_a_pattern_more_specific(pattern: list[str], data: st.DataObject) -> None:
    wild = [i for i, letter in enumerate(pattern) if letter in "?*"]
    if wild:
        literal = list(pattern)
        literal[data.draw(st.sampled_from(wild))] = "a"
        assert specificity("".join(literal)) > specificity("".join(pattern))


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


def test_tags_match_choices_of_the_grammar_and_count_as_much_as_parts() -> None:
    left = ClassSpec(name="left", tags={"place": "left"}, priority="top")
    assert left.claims("star/red", {"place": "left"})
    assert not left.claims("star/red", {"place": "right"})
    assert not left.claims("star/red")
    both = ClassSpec(name="left stars", pattern="star/*", tags={"place": "left"}, priority="top")
    assert both.specificity > left.specificity
    assert not both.claims("moon/red", {"place": "left"})
    choices = {"place": "left", "colour": "red"}
    assert ClassFile(classes=(both, of("star/red").classes[0])).owner("star/red", choices) == both
    as_much = ClassSpec(name="left reds", tags=choices, priority="top")
    with pytest.raises(Refused, match=r"'left reds' .* both claim 'star/red'"):
        ClassFile(classes=(of("star/red").classes[0], as_much)).owner("star/red", choices)


def test_a_file_without_the_optional_keys_keeps_the_fingerprint_in_existing_caches() -> None:
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
        ("[1, 2]", "mapping of keys to values"),
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
        ("classes: [{name: a, pattern: '*', priority: top}]\nclasses: []", "classes.yaml:2: .*duplicate key"),
        (
            "classes: [{name: a, pattern: '*', priority: top, weight: 1.0e308}, "
            "{name: b, pattern: b, priority: low, weight: 1.0e308}]",
            "no finite sum",
        ),
        ("classes: [{name: a, pattern: '*', priority: top, images: ~no-such-user/x}]", "no user 'no-such-user'"),
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


def test_the_folder_of_photographs_does_not_count_and_their_caption_does(tmp_path: Path) -> None:
    def fingerprint(folder: str, caption: str) -> str:
        spec = ClassSpec(name="zorks", priority="top", images=tmp_path / folder, caption=caption)
        return ClassFile(classes=(spec,)).sha256()

    assert fingerprint("one", "a zork") == fingerprint("other", "a zork") != fingerprint("one", "a blip")


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("priority: top", "no pattern and no tags"),
        ("priority: top, images: own, pictures: 3", "pictures without a pattern or tags"),
        ("priority: top, pattern: a, caption: a zork", "caption without images"),
    ],
)
def test_a_contradictory_entry_is_refused_with_the_class(entry: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "classes.yaml").write_text(f"classes: [{{name: zorks, {entry}}}]")
    with pytest.raises(Refused, match=f"class 'zorks': {reason}"):
        load_classes(tmp_path / "classes.yaml")
