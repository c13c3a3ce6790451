"""A small grammar of fixed phrases: one word for each phrase, prompt number i a function of (grammar, seed, i)."""

import hashlib
import random
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from string import Formatter
from typing import Literal

from pydantic import Field, ValidationError, model_validator

from configs.load import first_error
from configs.values import NonEmpty, Strict
from configs.yaml_text import read_yaml
from stages.prompts.prompt import Prompt, derived_seed
from stages.system.refusal import Refused, did_you_mean

MOST_TRIES = 10_000


class Phrase(Strict):
    """One slot of a sentence."""

    name: str
    text: NonEmpty = "{}"
    words: tuple[NonEmpty, ...] = Field(min_length=1)
    optional: bool = False

    @model_validator(mode="after")
    def _one_place(self) -> "Phrase":
        if [field for field in _fields(self.text) if field != ("", "", None)] or len(_fields(self.text)) > 1:
            raise ValueError(f"phrase {self.name!r}: text {self.text!r} should hold {{}} once, for the word")
        return self


class Grammar(Strict):
    """A sentence is "a" and one word for each phrase; a share of the sentences leaves optional phrases unsaid."""

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
        for pair in self.never:
            for name, word in pair.items():
                if word not in words.get(name, ()):
                    known = list(words.get(name, words))
                    raise ValueError(f"never: {name}: {word}: no phrase says that - {did_you_mean(word, known)}")
        if self.unsaid_share and all(phrase.optional for phrase in self.phrases):
            raise ValueError("every phrase is optional, so a sentence could say nothing - leave one that is not")
        return self

    def words_of(self, name: str) -> tuple[str, ...]:
        """The words that the phrase `name` may say."""
        return next(phrase.words for phrase in self.phrases if phrase.name == name)

    def sample_words(self, rng: random.Random) -> dict[str, str]:
        """One word for every phrase, never a forbidden combination."""
        for _ in range(MOST_TRIES):
            chosen = {phrase.name: rng.choice(phrase.words) for phrase in self.phrases}
            if not any(pair.items() <= chosen.items() for pair in self.never):
                return chosen
        raise Refused("prompts.grammar: `never` forbids all that the phrases could say - forbid less")

    def sample_omissions(self, rng: random.Random) -> set[str]:
        """The names of the phrases left out: none, or a non-empty random subset of the optional ones."""
        optional = [phrase.name for phrase in self.phrases if phrase.optional]
        if not optional or rng.random() >= self.unsaid_share:
            return set()
        return set(rng.sample(optional, rng.randint(1, len(optional))))

    def compose(self, words: dict[str, str]) -> str:
        """The sentence for the words given; phrases without a word are left out."""
        said = [phrase.text.format(words[phrase.name]) for phrase in self.phrases if phrase.name in words]
        article = "an" if said[0][0] in "aeiou" else "a"
        return " ".join([article, *said])

    def prompt(self, seed: int, index: int) -> Prompt:
        """Prompt number `index` of the endless list that belongs to `seed`."""
        rng = random.Random(derived_seed("grammar", seed, index))
        chosen = self.sample_words(rng)
        unsaid = self.sample_omissions(rng)
        text = self.compose({name: word for name, word in chosen.items() if name not in unsaid})
        said = tuple((name, word if name not in unsaid else f"({word}, unsaid)") for name, word in chosen.items())
        return Prompt(text, self.class_name.format(**chosen), derived_seed("picture", seed, index), said)


class GrammarSource(Strict):
    """Sentences from a symbolic grammar."""

    source: Literal["grammar"] = Field("grammar", description="what kind of source")
    grammar: Path = Field(description="YAML file of the grammar")

    def load(self) -> Grammar:
        """Read the grammar; raises `Refused` with the file's name."""
        return load_grammar(self.grammar)

    def identity(self) -> str:
        """What the prompts depend on."""
        return hashlib.sha256(self.load().model_dump_json().encode()).hexdigest()

    def format_lines(self) -> list[str]:
        """Nothing: a grammar is read in one way only."""
        return []

    def unusable_rows(self, prompt_count: int) -> dict[str, list[str]]:
        """None: a grammar's sentences are all usable."""
        return {}

    def iter_prompts(self, seed: int, start: int = 0) -> Iterator[Prompt]:
        """Prompts start, start + 1, ... of this seed."""
        grammar, index = self.load(), start
        while True:
            yield grammar.prompt(seed, index)
            index += 1


@lru_cache
def load_grammar(path: Path) -> Grammar:
    """Read a grammar file; raises `Refused` with its name and the first thing that is wrong."""
    content = read_yaml(path, f"prompts.grammar: {path}", "name a grammar file (YAML: phrases, class_name)")
    try:
        return Grammar.model_validate(content)
    except ValidationError as error:
        place, slip = first_error(error, Grammar, content)
        where = f"{'.'.join(map(str, place))}: " if place else ""
        raise Refused(f"{path}: {where}{slip}") from error


def _fields(text: str) -> list[tuple[str, str | None, str | None]]:
    """The fields in braces of a text: (name, format, conversion)."""
    return [(name, form, conversion) for _, name, form, conversion in Formatter().parse(text) if name is not None]
