"""The lexicon: the words of sentences, their weights, and which of them go together."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from string import Formatter

from pydantic import Field, model_validator

from configs.values import NonEmpty, Strict
from stages.prompts.prompt import load_model
from stages.system.refusal import did_you_mean

PACKAGED = Path(__file__).parent / "lexicon.yaml"
CLASS_NAME = re.compile(r"[a-z]+/[a-z]+(-[a-z]+)*")
SUBJECT, AMOUNT = "subject", "amount"
RESERVED_NAMES = (SUBJECT, "sentence", "family", "complexity")
"""Choices of every derivation, whose names no slot can have."""
MAX_SLOTS = 60


class Group(Strict):
    """Words with the same tags and conditions."""

    words: tuple[NonEmpty, ...] = Field(min_length=1)
    weight: int = Field(1, ge=1, description="of each word, relative to the other words of its slot")
    tags: tuple[str, ...] = Field((), description="what a word says about the scene")
    needs: tuple[str, ...] = Field((), description="at least one of these tags must be on an earlier word")
    never: tuple[str, ...] = Field((), description="none of these tags may be on an earlier word")


class Family(Strict):
    """Subjects of one kind: the first half of a class name, and a tag of all of them."""

    weight: int = Field(1, ge=1)
    groups: tuple[Group, ...] = Field(min_length=1)


class Sentence(Strict):
    """A form of sentence: slots in braces, in their order in the text."""

    text: str
    weight: int = Field(1, ge=1)

    def slots(self) -> tuple[str, ...]:
        """The slots' names in their order in the text."""
        return tuple(name for _, name, _, _ in Formatter().parse(self.text) if name)

    @model_validator(mode="after")
    def _plain_slots(self) -> "Sentence":
        for _, name, form, conversion in Formatter().parse(self.text):
            if name == "" or form or conversion:
                raise ValueError(f"{self.text!r}: braces should hold the name of a slot and nothing else")
        return self

    def clauses(self) -> int:
        """How many slots it has beside the subject and its amount."""
        return len(set(self.slots()) - {SUBJECT, AMOUNT})


@dataclass(frozen=True)
class Word:
    """One word or phrase, with its tags and conditions."""

    slot: str
    text: str
    plural: str = ""
    weight: int = 1
    tags: frozenset[str] = frozenset()
    needs: frozenset[str] = frozenset()
    never: frozenset[str] = frozenset()

    def fits(self, scene: frozenset[str]) -> bool:
        """Whether it can be used in a sentence with these tags."""
        return not self.never & scene and (not self.needs or bool(self.needs & scene))


class Lexicon(Strict):
    """Families of subjects, slots in the order of choosing, and forms of sentences for each level of complexity."""

    families: dict[str, Family] = Field(min_length=1)
    slots: dict[str, tuple[Group, ...]] = Field(max_length=MAX_SLOTS)
    levels: dict[int, tuple[Sentence, ...]] = Field(min_length=1)

    def subjects(self, family: str) -> Iterator[Word]:
        """The subjects of a family; `wolf/wolves` is one with an irregular plural."""
        for group in self.families[family].groups:
            for word in _words(SUBJECT, group):
                singular, _, irregular = word.text.partition("/")
                yield Word(SUBJECT, singular, irregular or plural(singular), word.weight, word.tags | {family})

    def words(self, slot: str) -> Iterator[Word]:
        """The words of a slot."""
        for group in self.slots[slot]:
            yield from _words(slot, group)

    def all_words(self) -> Iterator[Word]:
        """All subjects and all words."""
        for family in self.families:
            yield from self.subjects(family)
        for slot in self.slots:
            yield from self.words(slot)

    @model_validator(mode="after")
    def _check_words(self) -> "Lexicon":
        ambiguities = find_ambiguities(self.all_words())
        for problem in chain(self._sentence_problems(), self._tag_problems(), self._class_problems(), ambiguities):
            raise ValueError(problem)
        return self

    def _sentence_problems(self) -> Iterator[str]:
        for name in RESERVED_NAMES:
            if name in self.slots:
                yield f"slots.{name}: the name stands for something else in every sentence - take another"
        for level, sentences in self.levels.items():
            for sentence in sentences:
                for name in sentence.slots():
                    if name != SUBJECT and name not in self.slots:
                        yield f"levels.{level}: {name!r} is no slot - {did_you_mean(name, [SUBJECT, *self.slots])}"
                if SUBJECT not in sentence.slots() or AMOUNT not in sentence.slots():
                    yield f"levels.{level}: {sentence.text!r} must hold {{amount}} and {{subject}} - name both"
                if sentence.clauses() != level + 1:
                    yield f"levels.{level}: {sentence.text!r} has {sentence.clauses()} clauses, should have {level + 1}"

    def _tag_problems(self) -> Iterator[str]:
        known = {tag for word in self.all_words() for tag in word.tags}
        for word in self.all_words():
            for tag in sorted((word.needs | word.never) - known):
                yield f"{word.slot}: {word.text!r}: no word has the tag {tag!r} - {did_you_mean(tag, sorted(known))}"

    def _class_problems(self) -> Iterator[str]:
        class_names: set[str] = set()
        for family in self.families:
            for word in self.subjects(family):
                name = class_of(family, word)
                if not CLASS_NAME.fullmatch(name):
                    yield f"families.{family}: {word.text!r} makes no class name - write plain lower-case words"
                if name in class_names:
                    yield f"families.{family}: {word.text!r} is listed twice - remove one"
                class_names.add(name)


def class_of(family: str, subject: Word) -> str:
    """The class of a sentence about `subject`, such as animal/polar-bear."""
    return f"{family}/{subject.text.replace(' ', '-')}"


def plural(noun: str) -> str:
    """The regular plural, of the noun before `of` if there is one."""
    head, of, tail = noun.partition(" of ")
    if head.endswith(("s", "x", "ch", "sh")):
        return f"{head}es{of}{tail}"
    if head.endswith("y") and head[-2:-1] not in "aeiou":
        return f"{head[:-1]}ies{of}{tail}"
    return f"{head}s{of}{tail}"


def find_ambiguities(words: Iterable[Word]) -> Iterator[str]:
    """Words whose texts could be joined into one text in two ways, so that two derivations might be one sentence.

    Sardinas and Patterson (1953): follow the suffix that a longer word leaves over a shorter one until it is a word.
    """
    slot_of: dict[tuple[str, ...], str] = {}
    by_first: dict[str, set[tuple[str, ...]]] = {}
    for word in words:
        for text in {word.text, word.plural or word.text}:
            parts = tuple(text.split())
            if slot_of.setdefault(parts, word.slot) != word.slot:
                both = f"both {slot_of[parts]} and {word.slot}"
                yield f"{text!r} is {both}: a sentence could be read in two ways - remove one"
            by_first.setdefault(parts[0], set()).add(parts)
    pairs = ((short, long) for texts in by_first.values() for short in texts for long in texts - {short})
    pending = {(long[len(short) :], short) for short, long in pairs if long[: len(short)] == short}
    known = set(pending)
    while pending:
        suffix, origin = pending.pop()
        for text_parts in by_first.get(suffix[0], ()):
            if text_parts == suffix:
                begin, end = " ".join(origin), " ".join(suffix)
                yield f"{begin!r} begins and {end!r} ends words that can be read in two ways - change one"
            shorter, longer = sorted((text_parts, suffix), key=len)
            if text_parts != suffix and longer[: len(shorter)] == shorter:
                pair = (longer[len(shorter) :], origin)
                pending |= {pair} - known
                known.add(pair)


@lru_cache
def load_lexicon(path: Path) -> Lexicon:
    """Read a lexicon; raises `Refused` with its name and its first error."""
    return load_model(path, Lexicon, "prompts.lexicon", "leave it out for the packaged one")


def _words(slot: str, group: Group) -> Iterator[Word]:
    tags, needs, never = map(frozenset, (group.tags, group.needs, group.never))
    return (Word(slot, text, "", group.weight, tags, needs, never) for text in group.words)
