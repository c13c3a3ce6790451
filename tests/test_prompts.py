"""Laws of the prompt sources."""

from itertools import islice
from pathlib import Path

import pytest

from stages.prompts import FileSource, GrammarSource, derived_seed, prompts, split_of
from stages.system.refusal import Refused
from stages.tiny.world import world_grammar

SOURCE = GrammarSource(grammar=Path("stages/tiny/grammar.yaml"))


def test_prompt_i_is_a_function_of_seed_and_i() -> None:
    first = list(islice(SOURCE.iter_prompts(3), 40))
    assert first[17] == SOURCE.load().prompt(3, 17)
    assert first != list(islice(SOURCE.iter_prompts(4), 40))


def test_a_longer_list_begins_with_the_shorter_one() -> None:
    assert prompts(SOURCE, 0, "validation", 20)[:5] == prompts(SOURCE, 0, "validation", 5)


def test_no_sentence_is_in_both_splits() -> None:
    train = {prompt.text for prompt in prompts(SOURCE, 0, "train", 500)}
    validation = {prompt.text for prompt in prompts(SOURCE, 1, "validation", 100)}
    assert not train & validation
    assert {split_of(text) for text in validation} == {"validation"}


def test_forbidden_combinations_are_never_chosen() -> None:
    pairs = {tuple(pair.values()) for pair in world_grammar().never}
    chosen = {tuple(reversed(world_grammar().prompt(0, i).class_name.split("/"))) for i in range(5000)}
    assert len(chosen) == 100 - len(pairs)
    assert not chosen & pairs


def test_about_a_third_of_the_sentences_leave_out_phrases() -> None:
    complete = sum(len(world_grammar().prompt(0, i).text.split()) == 11 for i in range(3000))
    assert 0.62 < complete / 3000 < 0.72


def test_the_article_fits_the_word_after_it() -> None:
    assert world_grammar().compose({"colour": "orange", "shape": "star"}) == "an orange star"
    assert world_grammar().compose({"size": "small", "colour": "orange", "shape": "star"}) == "a small orange star"


def test_a_prompt_file_gives_classes_and_goes_round_with_fresh_seeds(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("cat\ta cat on a mat\n\na plain house\n")
    first, second, again = islice(FileSource(path=file).iter_prompts(0), 3)
    assert (first.text, first.class_name) == ("a cat on a mat", "cat")
    assert (second.text, second.class_name) == ("a plain house", "prompt")
    assert again.text == first.text
    assert again.seed != first.seed


def test_missing_sources_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"gone\.txt"):
        FileSource(path=tmp_path / "gone.txt").identity()
    with pytest.raises(Refused, match=r"gone\.yaml"):
        GrammarSource(grammar=tmp_path / "gone.yaml").load()


def test_a_source_without_sentences_of_a_split_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "one.txt"
    file.write_text(next(p.text for p in SOURCE.iter_prompts(0) if split_of(p.text) == "train"))
    with pytest.raises(Refused, match="too few sentences"):
        prompts(FileSource(path=file), 0, "validation", 1)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("phrases: [{name: a, words: [x]}, {name: a, words: [y]}]\nclass_name: x", "two phrases have the same name"),
        ("phrases: [{name: a, words: [x], text: '{} {}'}]\nclass_name: x", "should hold {} once"),
        ("phrases: [{name: a, words: [x], text: '{:>9999999999}'}]\nclass_name: x", "should hold {} once"),
        ("phrases: [{name: a, words: [x], text: '{'}]\nclass_name: x", "phrases.0: "),
        ("phrases: [{name: a, words: ['']}]\nclass_name: x", "phrases.0.words.0: '': should be a word or more"),
        ("phrases: [{name: a, words: [x], text: ' '}]\nclass_name: x", "phrases.0.text: ' ': should be a word"),
        ("phrases: [{name: a, words: [x]}]\nclass_name: '{a.upper}'", "should be the name of a phrase"),
        ("phrases: [{name: a, words: [x]}]\nclass_name: '{}'", "should be the name of a phrase"),
        ("phrases: [{name: a, words: [x]}]\nclass_name: x\nnever: [{a: y}]", "never: a: y: no phrase has this word"),
        ("phrases: [{name: a, words: [x]}]\nclass_name: x\nnever: [{a: x}]", "forbids every"),
        (
            "phrases: [{name: a, words: [x], optional: true}]\nclass_name: x\nunsaid_share: 1",
            "phrase is optional",
        ),
        ("phrases: [{name: a, words: [x], wrods: [y]}]\nclass_name: x", "phrases.0.wrods: .*did you mean words"),
        ("phrases: [{name: a, words: [x]}]", "class_name: required"),
    ],
)
def test_a_grammar_without_sentences_is_refused(content: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "g.yaml").write_text(content)
    with pytest.raises(Refused, match=reason) as refusal:
        next(GrammarSource(grammar=tmp_path / "g.yaml").iter_prompts(0))
    assert "\n" not in str(refusal.value)


def test_a_derived_seed_depends_on_every_part() -> None:
    assert len({derived_seed("a", 1), derived_seed("a", 2), derived_seed("b", 1), derived_seed("a1")}) == 4
    assert derived_seed("states", 7) == 0x7FFFFFFFFFFFFFFF & derived_seed("states", 7)
