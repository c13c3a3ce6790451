"""The lexicon: what can be said, how often, and what goes with what."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from string import Formatter

from pydantic import Field, ValidationError, model_validator

from configs.load import first_error
from configs.values import NonEmpty, Strict
from configs.yaml_text import read_yaml
from stages.system.refusal import Refused, did_you_mean

PACKAGED = Path(__file__).parent / "lexicon.yaml"
CLASS_NAME = re.compile(r"[a-z]+/[a-z]+(-[a-z]+)*")
SUBJECT, AMOUNT = "subject", "amount"
RESERVED_NAMES = (SUBJECT, "sentence", "family", "complexity")
"""Choices of every derivation, whose names no slot can have."""
MOST_SLOTS = 60


class Group(Strict):
    """Words that keep the same company."""

    words: tuple[NonEmpty, ...] = Field(min_length=1)
    weight: int = Field(1, ge=1, description="of each word, relative to the other words of its slot")
    tags: tuple[str, ...] = Field((), description="what saying it says about the scene")
    needs: tuple[str, ...] = Field((), description="at least one of these must be said of the scene before")
    never: tuple[str, ...] = Field((), description="none of these may have been said")


class Family(Strict):
    """Subjects of one kind: the first half of a class name, and a tag of all of them."""

    weight: int = Field(1, ge=1)
    groups: tuple[Group, ...] = Field(min_length=1)


class Sentence(Strict):
    """A form of sentence: slots in braces, in the order of saying."""

    text: str
    weight: int = Field(1, ge=1)

    def slots(self) -> tuple[str, ...]:
        """The slots' names in the order of saying."""
        return tuple(name for _, name, _, _ in Formatter().parse(self.text) if name)

    @model_validator(mode="after")
    def _plain_slots(self) -> "Sentence":
        for _, name, form, conversion in Formatter().parse(self.text):
            if name == "" or form or conversion:
                raise ValueError(f"{self.text!r}: braces should hold the name of a slot and nothing else")
        return self

    def clauses(self) -> int:
        """How much it says beside naming its subject."""
        return len(set(self.slots()) - {SUBJECT, AMOUNT})


@dataclass(frozen=True)
class Word:
    """One thing to say, with its company."""

    slot: str
    text: str
    plural: str = ""
    weight: int = 1
    tags: frozenset[str] = frozenset()
    needs: frozenset[str] = frozenset()
    never: frozenset[str] = frozenset()

    def fits(self, scene: frozenset[str]) -> bool:
        """Whether it can be said of a scene."""
        return not self.never & scene and (not self.needs or bool(self.needs & scene))


class Lexicon(Strict):
    """Families of subjects, slots in the order of choosing, and forms of sentences for each level of complexity."""

    families: dict[str, Family] = Field(min_length=1)
    slots: dict[str, tuple[Group, ...]] = Field(max_length=MOST_SLOTS)
    levels: dict[int, tuple[Sentence, ...]] = Field(min_length=1)

    def subjects(self, family: str) -> Iterator[Word]:
        """The subjects of a family; `wolf/wolves` says an irregular plural."""
        for group in self.families[family].groups:
            for word in _words(SUBJECT, group):
                one, _, many = word.text.partition("/")
                yield Word(SUBJECT, one, many or plural(one), word.weight, word.tags | {family})

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
        for slip in chain(self._sentences(), self._tags(), self._classes(), find_ambiguities(self.all_words())):
            raise ValueError(slip)
        return self

    def _sentences(self) -> Iterator[str]:
        for name in RESERVED_NAMES:
            if name in self.slots:
                yield f"slots.{name}: the name stands for something else in every sentence - take another"
        for level, sentences in self.levels.items():
            for sentence in sentences:
                for name in sentence.slots():
                    if name != SUBJECT and name not in self.slots:
                        yield f"levels.{level}: {name!r} is no slot - {did_you_mean(name, [SUBJECT, *self.slots])}"
                if SUBJECT not in sentence.slots() or AMOUNT not in sentence.slots():
                    yield f"levels.{level}: {sentence.text!r} must say {{amount}} and {{subject}} - name both"
                if sentence.clauses() != level + 1:
                    yield f"levels.{level}: {sentence.text!r} has {sentence.clauses()} clauses, should have {level + 1}"

    def _tags(self) -> Iterator[str]:
        known = {tag for word in self.all_words() for tag in word.tags}
        for word in self.all_words():
            for tag in sorted((word.needs | word.never) - known):
                yield f"{word.slot}: {word.text!r}: no word has the tag {tag!r} - {did_you_mean(tag, sorted(known))}"

    def _classes(self) -> Iterator[str]:
        seen: set[str] = set()
        for family in self.families:
            for word in self.subjects(family):
                name = class_of(family, word)
                if not CLASS_NAME.fullmatch(name):
                    yield f"families.{family}: {word.text!r} makes no class name - write plain lower-case words"
                if name in seen:
                    yield f"families.{family}: {word.text!r} is listed twice - remove one"
                seen.add(name)


def class_of(family: str, subject: Word) -> str:
    """The class of a sentence about `subject`, such as animal/polar-bear."""
    return f"{family}/{subject.text.replace(' ', '-')}"


def plural(noun: str) -> str:
    """The regular plural; what stands before `of` is what is counted."""
    head, of, tail = noun.partition(" of ")
    if head.endswith(("s", "x", "ch", "sh")):
        return f"{head}es{of}{tail}"
    if head.endswith("y") and head[-2:-1] not in "aeiou":
        return f"{head[:-1]}ies{of}{tail}"
    return f"{head}s{of}{tail}"


def find_ambiguities(words: Iterable[Word]) -> Iterator[str]:
    """Words that could be strung together into one text in two ways, so that two derivations might say the same.

    Sardinas and Patterson (1953): follow what a longer word leaves over a shorter one until it is nothing, or a word.
    """
    slot_of: dict[tuple[str, ...], str] = {}
    by_first: dict[str, set[tuple[str, ...]]] = {}
    for word in words:
        for text in {word.text, word.plural or word.text}:
            said = tuple(text.split())
            if slot_of.setdefault(said, word.slot) != word.slot:
                both = f"both {slot_of[said]} and {word.slot}"
                yield f"{text!r} is {both}: a sentence could be read in two ways - remove one"
            by_first.setdefault(said[0], set()).add(said)
    left = {(long[len(one) :], one) for same in by_first.values() for one in same for long in _longer(one, same)}
    seen = set(left)
    while left:
        over, origin = left.pop()
        for word_ in by_first.get(over[0], ()):
            if word_ == over:
                begin, end = " ".join(origin), " ".join(over)
                yield f"{begin!r} begins and {end!r} ends words that can be read in two ways - change one"
            shorter, longer = sorted((word_, over), key=len)
            if word_ != over and longer[: len(shorter)] == shorter:
                found = (longer[len(shorter) :], origin)
                left |= {found} - seen
                seen.add(found)


def _longer(one: tuple[str, ...], others: Iterable[tuple[str, ...]]) -> Iterator[tuple[str, ...]]:
    return (other for other in others if len(other) > len(one) and other[: len(one)] == one)


@lru_cache
def load_lexicon(path: Path) -> Lexicon:
    """Read a lexicon; raises `Refused` with its name and the first thing that is wrong."""
    content = read_yaml(path, f"prompts.lexicon: {path}", "leave it out for the packaged one")
    try:
        return Lexicon.model_validate(content)
    except ValidationError as error:
        place, slip = first_error(error, Lexicon, content)
        where = f"{'.'.join(map(str, place))}: " if place else ""
        raise Refused(f"{path}: {where}{slip}") from error


def _words(slot: str, group: Group) -> Iterator[Word]:
    for text in group.words:
        yield Word(
            slot,
            text,
            weight=group.weight,
            tags=frozenset(group.tags),
            needs=frozenset(group.needs),
            never=frozenset(group.never),
        )
