"""Laws of the prompts that no class owns."""

from itertools import islice
from pathlib import Path

from stages.classes.selection import outside_prompts
from stages.classes.specification import ClassFile, ClassSpec
from stages.prompts import GrammarSource, split_of

SOURCE = GrammarSource(grammar=Path("stages/tiny/grammar.yaml"))


def classes(pattern: str) -> ClassFile:
    return ClassFile(classes=(ClassSpec(name="some", pattern=pattern, priority="top"),))


def test_they_are_the_first_of_their_split_that_no_class_claims() -> None:
    outside = outside_prompts(SOURCE, 3, "validation", classes("[!s]*"), 20)
    listed = islice(SOURCE.iter_prompts(3), 5000)
    expected = [prompt for prompt in listed if prompt.class_name[0] == "s" and split_of(prompt.text) == "validation"]
    assert outside == expected[:20]


def test_classes_that_own_everything_leave_none() -> None:
    assert outside_prompts(SOURCE, 3, "validation", classes("*"), 1) == []
