"""Laws of the symbolic source: numbers and sentences, one to one."""

import re
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from stages.classes.specification import load_classes
from stages.prompts import SymbolicSource, prompts
from stages.prompts.lexicon import CLASS_NAME, PACKAGED, Word, find_ambiguities, load_lexicon, plural
from stages.prompts.space import Choice, Option, even_stride, make_choice, options_at, permute
from stages.system.refusal import Refused

SOURCE = SymbolicSource()
MANY = list(islice(SOURCE.iter_prompts(42), 20_000))
FORBIDDEN = re.compile(
    r"\b(nude|naked|sexy|child|children|boy|girl|teen\w*|kill\w*|dead|blood\w*|gun|rifle|weapon|knife|corpse|swastika)\b"
)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000])
def test_a_shuffle_is_a_bijection(size: int) -> None:
    assert sorted(permute(i, size, 5) for i in range(size)) == list(range(size))
    assert sorted(i * even_stride(size) % size for i in range(size)) == list(range(size))


def test_shuffles_of_different_keys_differ() -> None:
    assert [permute(i, 100, 1) for i in range(100)] != [permute(i, 100, 2) for i in range(100)]


def test_the_numbers_of_a_space_are_its_derivations_one_to_one() -> None:
    def level(names: str, rest: Choice[str], heaviest: int) -> Choice[str]:
        return make_choice(Option(name, 1 + i % heaviest, rest) for i, name in enumerate(names))

    for heaviest, least in ((1, 24), (2, 12), (3, 8)):
        space = level("ab", level("cde", level("fghi", Choice(), heaviest), heaviest), heaviest)
        texts = {"".join(options_at(space, number)) for number in range(space.size)}
        assert least <= len(texts) == space.size <= 24


def test_weights_hold_where_there_are_enough_choices() -> None:
    rest = make_choice(Option(f"x{i}", 1, Choice()) for i in range(90))
    counts = Counter(
        next(options_at(space, n))
        for space in [make_choice([Option("a", 3, rest), Option("b", 1, rest)])]
        for n in range(space.size)
    )
    assert counts == {"a": 90, "b": 30}


def test_prompts_are_distinct() -> None:
    assert len({prompt.text for prompt in MANY}) == len(MANY)


def test_prompt_i_is_a_function_of_seed_and_i() -> None:
    assert next(SOURCE.iter_prompts(42, 12_345)) == MANY[12_345]
    assert next(SOURCE.iter_prompts(43, 12_345)) != MANY[12_345]
    assert prompts(SOURCE, 42, "validation", 30)[:7] == prompts(SOURCE, 42, "validation", 7)


def test_after_the_last_distinct_sentence_they_come_again_with_other_pictures() -> None:
    space = SOURCE.load()
    assert space.prompt(0, space.size).seed != space.prompt(0, 0).seed
    assert space.size > 300_000


def test_the_shares_of_complexity_hold_and_complexity_counts_clauses() -> None:
    counts = Counter(dict(prompt.derivation)["complexity"] for prompt in MANY)
    for level, share in enumerate(SOURCE.complexity, 1):
        assert counts[str(level)] / len(MANY) == pytest.approx(share / 9, abs=0.01)
    for prompt in MANY[:500]:
        choices = dict(prompt.derivation)
        assert (
            len(choices) - len(("complexity", "sentence", "family", "subject", "amount"))
            == int(choices["complexity"]) + 1
        )


def test_only_the_named_levels_are_used() -> None:
    source = SymbolicSource(complexity=(1, 0))
    assert {dict(p.derivation)["complexity"] for p in islice(source.iter_prompts(0), 200)} == {"1"}


def test_class_names_are_families_and_subjects() -> None:
    lexicon = load_lexicon(PACKAGED)
    assert all(CLASS_NAME.fullmatch(prompt.class_name) for prompt in MANY)
    assert {prompt.class_name.split("/")[0] for prompt in MANY} == set(lexicon.families)


def test_the_example_classes_exist_and_are_disjoint() -> None:
    classes = load_classes(Path("configs/classes/sd15.yaml"))
    owners = {owner.name for prompt in MANY if (owner := classes.owner(prompt.class_name))}
    assert owners == {spec.name for spec in classes.classes}


def test_every_word_is_reachable_and_nearly_all_are_used() -> None:
    used = {(name, text) for prompt in MANY for name, text in prompt.derivation}
    words = {(word.slot, word.text) for word in load_lexicon(PACKAGED).all_words()}
    assert len(words - used) / len(words) < 0.01
    assert not SOURCE.load().unreachable()


def test_articles_fit() -> None:
    assert not [prompt.text for prompt in MANY if re.search(r"\ba [aeio]|\ban [^aeiouh]", prompt.text)]


def test_numbers_agree() -> None:
    for prompt in MANY:
        if dict(prompt.derivation)["amount"] != "a":
            assert " its " not in prompt.text
            assert not re.search(r"\b(two|three) [^,]*\b(wolf|sheeps|mans|womans|in a woollen coat)\b", prompt.text)


def test_plurals_are_regular_unless_listed() -> None:
    assert [plural(noun) for noun in ("fox", "puppy", "monkey", "bowl of rice", "cat")] == [
        "foxes", "puppies", "monkeys", "bowls of rice", "cats"]  # fmt: skip


def test_a_word_of_one_letter_has_a_plural() -> None:
    assert plural("y") == "ys"


def test_incompatible_words_are_not_combined() -> None:
    for prompt in MANY:
        choices = dict(prompt.derivation)
        assert "wearing" not in choices or choices["family"] == "person"
        assert not (
            "camera" in choices and choices.get("medium", "a photo").split()[-2] in ("painting", "drawing", "sketch")
        )
        assert not ("colour" in choices and "black and white" in choices.get("medium", ""))


def test_nothing_forbidden_is_in_the_lexicon() -> None:
    texts = [word.text for word in load_lexicon(PACKAGED).all_words()]
    assert not [text for text in texts if FORBIDDEN.search(text)]
    assert not [text for text in texts if re.search(r"[A-Z]", text.replace("3D", ""))], (
        "names of persons begin with capitals"
    )


def test_words_that_can_be_read_in_two_ways_are_detected() -> None:
    def slips(*texts: str) -> list[str]:
        return list(find_ambiguities(Word("slot", text) for text in texts))

    assert slips("red", "panda", "red panda")
    assert slips("a", "b c", "a b", "c")
    assert slips("red", "panda", "red brick", "brick red panda"), "red brick|red|panda is red|brick red panda"
    assert not slips("red", "panda", "red brick", "brick panda bear")
    assert list(find_ambiguities([Word("one", "red"), Word("other", "red")]))


SMALL = {
    "families": {"animal": {"groups": [{"words": ["fox", "owl"], "tags": ["wild"]}]}},
    "slots": {"amount": [{"words": ["a"]}], "look": [{"words": ["red", "old"]}], "place": [{"words": ["at home"]}]},
    "levels": {1: [{"text": "{amount} {look} {subject} {place}"}]},
}


def changed(tmp_path: Path, where: str, value: object) -> SymbolicSource:
    content = yaml.safe_load(yaml.safe_dump(SMALL))
    here = content
    *path, last = where.split(".")
    for step in path:
        here = here[int(step) if step.isdigit() else step]
    here[last] = value
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump(content))
    return SymbolicSource(complexity=(1,), lexicon=file)


def test_a_custom_lexicon_makes_sentences(tmp_path: Path) -> None:
    source = changed(tmp_path, "families.animal.weight", 2)
    assert source.load().size == 4
    texts = [prompt.text for prompt in islice(source.iter_prompts(0), 4)]
    assert sorted(texts) == ["a red fox at home", "a red owl at home", "an old fox at home", "an old owl at home"]


@pytest.mark.parametrize(
    ("where", "value", "problem"),
    [
        ("slots.place", [{"words": ["at home"], "needs": ["wilt"]}], "'wilt'.*did you mean wild"),
        ("slots.place", [{"words": ["at home"]}, {"words": ["away"], "never": ["wild"]}], "'away' is in no sentence"),
        ("levels", {1: [{"text": "{amount} {lok} {subject} {place}"}]}, "'lok' is no slot - did you mean look"),
        ("levels", {1: [{"text": "{amount} {look} {subject}"}]}, "has 1 clauses, should have 2"),
        ("levels", {1: [{"text": "{look} {subject} {place}"}]}, "must hold {amount} and {subject}"),
        ("families.animal.groups", [{"words": ["Fox"]}], "'Fox' makes no class name"),
        ("families.animal.groups", [{"words": ["fox", "fox"]}], "'fox' is listed twice"),
        ("families.animal.groups", [{"words": ["owl", "red owl"]}], "can be read in two ways"),
        ("families.animal.groups", [{"words": ["fox", " "]}], "words.1: ' ': should be a word or more"),
        ("families.animal.groups", [{"words": ["/foxes"]}], "makes no class name"),
        ("slots.family", [{"words": ["b"]}], "slots.family: the name stands for something else"),
        ("levels", {1: [{"text": "{amount} {} {look} {subject}"}]}, "should hold the name of a slot"),
        ("levels", {1: [{"text": "{amount} {look:>99999} {subject}"}]}, "should hold the name of a slot"),
        ("levels", {1: [{"text": "{amount"}]}, "levels.1.0: "),
        ("families.animal.wait", 3, "families.animal.wait: 3: unknown key - did you mean weight"),
    ],
)
def test_a_wrong_lexicon_is_refused_by_name(tmp_path: Path, where: str, value: object, problem: str) -> None:
    with pytest.raises(Refused, match=rf"own\.yaml: .*{problem}"):
        changed(tmp_path, where, value).load()


def test_a_complexity_that_nothing_can_say_is_refused(tmp_path: Path) -> None:
    content = yaml.safe_load(yaml.safe_dump(SMALL))
    content["families"]["person"] = {"groups": [{"words": ["cook"]}]}
    content["slots"] |= {
        "mood": [{"words": ["gloomily"], "never": ["wild"]}],
        "den": [{"words": ["deep"], "needs": ["wild"]}],
    }
    content["levels"] = {
        1: [{"text": "{amount} {subject} {mood} {den}"}],
        2: [{"text": "{amount} {look} {subject} {place} {mood}"}, {"text": "{amount} {look} {subject} {place} {den}"}],
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(content))
    assert SymbolicSource(complexity=(0, 1), lexicon=tmp_path / "own.yaml").load().size
    with pytest.raises(Refused, match=r"own\.yaml: no sentence of complexity \(1,\) is possible"):
        SymbolicSource(complexity=(1,), lexicon=tmp_path / "own.yaml").load()


def test_levels_and_files_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="complexity: 6: no such level"):
        SymbolicSource(complexity=(1,) * 9).load()
    with pytest.raises(Refused, match=r"gone\.yaml does not exist"):
        SymbolicSource(lexicon=tmp_path / "gone.yaml").load()
    with pytest.raises(ValidationError, match="one of them positive"):
        SymbolicSource(complexity=(0,))


def test_the_identity_depends_on_knobs_and_lexicon(tmp_path: Path) -> None:
    own = changed(tmp_path, "families.animal.weight", 2)
    assert len({SOURCE.identity(), SymbolicSource(complexity=(1,)).identity(), own.identity()}) == 3
