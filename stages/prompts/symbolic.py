"""Sentences from a lexicon: subject, attributes, action, setting, style, light, camera, mood."""

import hashlib
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from stages.prompts.lexicon import AMOUNT, PACKAGED, SUBJECT, Lexicon, Word, class_of, load_lexicon
from stages.prompts.prompt import ComposedSource, Prompt, derived_seed
from stages.prompts.space import Choice, Option, make_choice, options_at, permute, values
from stages.system.refusal import Refused

GENERATOR = 1  # raise it when the same lexicon would give other sentences: it is part of a cache's recipe
VOWEL_SOUND = re.compile(r"\ba (?=(?:[aeio]|u(?!ni|se|ku)|hour|honest|heir)(?<!\bone)(?!ne-|uro))")

Link = tuple[str, str | Word]
"""(the name of a choice, what was chosen)."""


class SymbolicSource(ComposedSource):
    """Sentences from a lexicon of subjects, attributes, actions, settings, styles, lights, cameras and moods."""

    source: Literal["symbolic"] = Field("symbolic", description="what kind of source")
    complexity: tuple[int, ...] = Field(
        (1, 2, 3, 2, 1),
        min_length=1,
        description="shares of the levels 1, 2, ...; a sentence of level n has n + 1 clauses about its subject",
    )
    lexicon: Path | None = Field(None, description="YAML file of a lexicon of one's own; none is the packaged one")

    @field_validator("complexity")
    @classmethod
    def _shares(cls, shares: tuple[int, ...]) -> tuple[int, ...]:
        if min(shares) < 0 or not any(shares):
            raise ValueError("shares should be 0 or more, and one of them positive")
        return shares

    def load(self) -> "SentenceSpace":
        """The lexicon with its space of sentences; raises `Refused` with the file's name."""
        return load_sentence_space(self.lexicon or PACKAGED, self.complexity)

    def identity(self) -> str:
        """A digest of all that the prompts depend on."""
        lexicon = load_lexicon(self.lexicon or PACKAGED).model_dump_json()
        return hashlib.sha256(f"{GENERATOR}{self.complexity}{lexicon}".encode()).hexdigest()


class SentenceSpace:
    """A lexicon's space of sentences, each with a number."""

    def __init__(self, lexicon: Lexicon, shares: Mapping[int, int]) -> None:
        self._choice_cache: dict[tuple[tuple[str, ...], frozenset[str]], Choice[Link]] = {}
        self._lexicon = lexicon
        self._words = {slot: tuple(lexicon.words(slot)) for slot in lexicon.slots}
        self._relevant_tags = {
            slot: frozenset(tag for word in words for tag in word.needs | word.never)
            for slot, words in self._words.items()
        }
        self.root: Choice[Link] = make_choice(
            Option(("complexity", str(level)), share, make_choice(self._sentence_options(level)))
            for level, share in shares.items()
        )

    @property
    def size(self) -> int:
        """How many sentences there are, all distinct."""
        return self.root.size

    def prompt(self, seed: int, index: int) -> Prompt:
        """Prompt number `index` of this seed: `size` distinct ones, then all of them again in another order."""
        shuffle, place = divmod(index, self.size)
        number = permute(place, self.size, derived_seed("symbolic", seed, shuffle))
        return compose_prompt(dict(options_at(self.root, number)), derived_seed("picture", seed, index))

    def unreachable(self) -> list[Word]:
        """Words that are in no sentence."""
        reached = {(name, link.text) for name, link in values(self.root) if isinstance(link, Word)}
        return [word for word in self._lexicon.all_words() if (word.slot, word.text) not in reached]

    def _sentence_options(self, level: int) -> Iterator[Option[Link]]:
        for sentence in self._lexicon.levels[level]:
            slots = tuple(slot for slot in self._lexicon.slots if slot in sentence.slots())
            yield Option(("sentence", sentence.text), sentence.weight, make_choice(self._family_options(slots)))

    def _family_options(self, slots: tuple[str, ...]) -> Iterator[Option[Link]]:
        for name, family in self._lexicon.families.items():
            members = [
                Option((SUBJECT, word), word.weight, self._slot_choice(slots, word.tags))
                for word in self._lexicon.subjects(name)
            ]
            yield Option(("family", name), family.weight, make_choice(members))

    def _slot_choice(self, slots: tuple[str, ...], scene: frozenset[str]) -> Choice[Link]:
        """The choices of the remaining slots, cached by the tags that their words need or exclude."""
        if not slots:
            return Choice()
        key = (slots, scene & frozenset[str]().union(*(self._relevant_tags[slot] for slot in slots)))
        if key not in self._choice_cache:
            # By text, so that a word listed in two fitting groups is one option.
            fitting = {word.text: word for word in self._words[slots[0]] if word.fits(key[1])}
            self._choice_cache[key] = make_choice(
                Option((word.slot, word), word.weight, self._slot_choice(slots[1:], key[1] | word.tags))
                for word in fitting.values()
            )
        return self._choice_cache[key]


def compose_prompt(links: Mapping[str, str | Word], seed: int) -> Prompt:
    """The sentence of a derivation, with articles, plurals and possessives in agreement."""
    words = {name: word for name, word in links.items() if isinstance(word, Word)}
    many = "plural" in words[AMOUNT].tags
    texts = {name: word.text.replace("{its}", "their" if many else "its") for name, word in words.items()}
    texts[SUBJECT] = words[SUBJECT].plural if many else words[SUBJECT].text
    text = VOWEL_SOUND.sub("an ", str(links["sentence"]).format(**texts))
    derivation = tuple((name, link if isinstance(link, str) else link.text) for name, link in links.items())
    return Prompt(text, class_of(str(links["family"]), words[SUBJECT]), seed, derivation)


@lru_cache
def load_sentence_space(path: Path, complexity: tuple[int, ...]) -> SentenceSpace:
    """The sentences of a lexicon file; raises `Refused` for unknown levels, unreachable words and an empty space."""
    lexicon = load_lexicon(path)
    for level in range(1, len(complexity) + 1):
        if level not in lexicon.levels:
            known = ", ".join(map(str, lexicon.levels))
            raise Refused(f"prompts.complexity: {level}: no such level - known here: {known}")
    for word in SentenceSpace(lexicon, dict.fromkeys(lexicon.levels, 1)).unreachable():
        raise Refused(f"{path}: {word.slot}: {word.text!r} is in no sentence - check its needs and never")
    space = SentenceSpace(lexicon, dict(enumerate(complexity, 1)))
    if not space.size:
        raise Refused(f"{path}: no sentence of complexity {complexity} is possible - check the words' needs and never")
    return space
