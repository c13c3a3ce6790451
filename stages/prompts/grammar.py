"""A small grammar of fixed phrases: one word for each phrase, prompt number i a function of (grammar, seed, i)."""

import hashlib
import random
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, ValidationError

from configs.refusal import Refused
from configs.strict import Strict
from stages.prompts.prompt import Prompt, derived_seed


class Phrase(Strict):
    """One slot of a sentence."""

    name: str
    text: str = "{}"
    words: tuple[str, ...] = Field(min_length=1)
    optional: bool = False


class Grammar(Strict):
    """A sentence is "a" and one word for each phrase; a share of the sentences leaves optional phrases unsaid."""

    phrases: tuple[Phrase, ...] = Field(min_length=1)
    unsaid_share: float = Field(0.0, ge=0, le=1)
    class_name: str
    never: tuple[dict[str, str], ...] = ()

    def words_of(self, name: str) -> tuple[str, ...]:
        """The words that the phrase `name` may say."""
        return next(phrase.words for phrase in self.phrases if phrase.name == name)

    def choose(self, rng: random.Random) -> dict[str, str]:
        """One word for every phrase, never a forbidden combination."""
        while True:
            chosen = {phrase.name: rng.choice(phrase.words) for phrase in self.phrases}
            if not any(pair.items() <= chosen.items() for pair in self.never):
                return chosen

    def unsaid(self, rng: random.Random) -> set[str]:
        """The names of the phrases left out: none, or a non-empty random subset of the optional ones."""
        optional = [phrase.name for phrase in self.phrases if phrase.optional]
        if not optional or rng.random() >= self.unsaid_share:
            return set()
        return set(rng.sample(optional, rng.randint(1, len(optional))))

    def say(self, chosen: dict[str, str]) -> str:
        """The sentence for the words given; phrases without a word are left out."""
        said = [phrase.text.format(chosen[phrase.name]) for phrase in self.phrases if phrase.name in chosen]
        article = "an" if said[0][0] in "aeiou" else "a"
        return " ".join([article, *said])

    def prompt(self, seed: int, index: int) -> Prompt:
        """Prompt number `index` of the endless list that belongs to `seed`."""
        rng = random.Random(derived_seed("grammar", seed, index))
        chosen = self.choose(rng)
        unsaid = self.unsaid(rng)
        text = self.say({name: word for name, word in chosen.items() if name not in unsaid})
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

    def faults(self, among: int) -> dict[str, list[str]]:
        """None: a grammar's sentences are all usable."""
        return {}

    def endless(self, seed: int, start: int = 0) -> Iterator[Prompt]:
        """Prompts start, start + 1, ... of this seed."""
        grammar, index = self.load(), start
        while True:
            yield grammar.prompt(seed, index)
            index += 1


@lru_cache
def load_grammar(path: Path) -> Grammar:
    """Read a grammar file; raises `Refused` with its name and the first thing that is wrong."""
    if not path.is_file():
        raise Refused(f"prompts.grammar: {path} does not exist - name a grammar file (YAML: phrases, class_name)")
    try:
        return Grammar.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        raise Refused(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
