"""A small grammar of fixed phrases: one word for each phrase, prompt number i a function of (grammar, seed, i)."""

import hashlib
import random
from functools import lru_cache
from pathlib import Path
from string import Formatter
from typing import Literal

from pydantic import Field, model_validator

from configs.values import NonEmpty, Strict
from stages.prompts.prompt import ComposedSource, Prompt, derived_seed, load_model
from stages.system.refusal import Refused, did_you_mean

MAX_TRIES = 10_000


class Phrase(Strict):
    """One slot of a sentence."""

    name: str
    text: NonEmpty = "{}"
    words: tuple[NonEmpty, ...] = Field(min_length=1)
    optional: bool = False

    @model_validator(mode="after")
    def _check_text(self) -> "Phrase":
        if _fields(self.text) not in ([], [("", "", None)]):
            raise ValueError(f"phrase {self.name!r}: text {self.text!r} should hold {{}} once, for the word")
        return self


class Grammar(Strict):
    """A sentence is "a" and one word for each phrase; a share of the sentences leaves out optional phrases."""

    phrases: tuple[Phrase, ...] = Field(min_length=1)
    unsaid_share: float = Field(0.0, ge=0, le=1)
    class_name: str
    never: tuple[dict[str, str], ...] = ()

    @model_validator(mode="after")
    def _check_phrases(self) -> "Grammar":
        words = {phrase.name: phrase.words for phrase in self.phrases}
        if len(words) < len(self.phrases):
            raise ValueError("two phrases have the same name - give each its own")
        for name, form, conversion in _fields(self.class_name):
            if name not in words or form or conversion:
                raise ValueError(
                    f"class_name: {{{name}}} should be the name of a phrase - {did_you_mean(name, list(words))}"
                )
        for name, word in (item for combination in self.never for item in combination.items()):
            if word not in words.get(name, ()):
                known = list(words.get(name, words))
                raise ValueError(f"never: {name}: {word}: no phrase has this word - {did_you_mean(word, known)}")
        if self.unsaid_share and all(phrase.optional for phrase in self.phrases):
            raise ValueError("every phrase is optional, so a sentence could be empty - leave one that is not")
        return self

    def words_of(self, name: str) -> tuple[str, ...]:
        """The words of the phrase `name`."""
        return next(phrase.words for phrase in self.phrases if phrase.name == name)

    def sample_words(self, rng: random.Random) -> dict[str, str]:
        """One word for every phrase, never a forbidden combination."""
        for _ in range(MAX_TRIES):
            words = {phrase.name: rng.choice(phrase.words) for phrase in self.phrases}
            if not any(combination.items() <= words.items() for combination in self.never):
                return words
        raise Refused("prompts.grammar: `never` forbids every combination of words - forbid less")

    def sample_omissions(self, rng: random.Random) -> set[str]:
        """The names of the phrases left out: none, or a non-empty random subset of the optional ones."""
        optional = [phrase.name for phrase in self.phrases if phrase.optional]
        if not optional or rng.random() >= self.unsaid_share:
            return set()
        return set(rng.sample(optional, rng.randint(1, len(optional))))

    def compose(self, words: dict[str, str]) -> str:
        """The sentence of these words by phrase; phrases without a word are left out."""
        texts = [phrase.text.format(words[phrase.name]) for phrase in self.phrases if phrase.name in words]
        article = "an" if texts[0][0] in "aeiou" else "a"
        return " ".join([article, *texts])

    def prompt(self, seed: int, index: int) -> Prompt:
        """Prompt number `index` of the endless list that belongs to `seed`."""
        rng = random.Random(derived_seed("grammar", seed, index))
        words = self.sample_words(rng)
        omitted = self.sample_omissions(rng)
        text = self.compose({name: word for name, word in words.items() if name not in omitted})
        derivation = tuple((name, f"({word}, unsaid)" if name in omitted else word) for name, word in words.items())
        return Prompt(text, self.class_name.format(**words), derived_seed("picture", seed, index), derivation)


class GrammarSource(ComposedSource):
    """Sentences from a symbolic grammar."""

    source: Literal["grammar"] = Field("grammar", description="what kind of source")
    grammar: Path = Field(description="YAML file of the grammar")

    def load(self) -> Grammar:
        """Read the grammar; raises `Refused` with the file's name."""
        return load_grammar(self.grammar)

    def identity(self) -> str:
        """A digest of all that the prompts depend on."""
        return hashlib.sha256(self.load().model_dump_json().encode()).hexdigest()


@lru_cache
def load_grammar(path: Path) -> Grammar:
    """Read a grammar file; raises `Refused` with its name and its first error."""
    return load_model(path, Grammar, "prompts.grammar", "name a grammar file (YAML: phrases, class_name)")


def _fields(text: str) -> list[tuple[str, str | None, str | None]]:
    """The fields in braces of a text: (name, format, conversion)."""
    return [(name, form, conversion) for _, name, form, conversion in Formatter().parse(text) if name is not None]
