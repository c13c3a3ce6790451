"""Where prompts come from: a grammar or a text file; prompt number i is a function of (source, seed, i) alone."""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, JsonValue, ValidationError

from configs.refusal import Refused
from configs.strict import Strict

Split = Literal["train", "validation"]
VALIDATION_ONE_IN = 16


@dataclass(frozen=True)
class Prompt:
    """A sentence, the class it belongs to (`family/member`, for quotas and globs) and the seed of its picture."""

    text: str
    class_name: str
    seed: int


def derived_seed(*parts: object) -> int:
    """A 63-bit seed that depends on every part and on nothing else (not on the process, platform or order of calls)."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def split_of(text: str) -> Split:
    """The split that owns a sentence: decided by the sentence itself, so no source can leak one into the other."""
    return "validation" if derived_seed("split", text) % VALIDATION_ONE_IN == 0 else "train"


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
        return Prompt(text, self.class_name.format(**chosen), derived_seed("picture", seed, index))


class GrammarSource(Strict):
    """Sentences from a symbolic grammar."""

    source: Literal["grammar"] = Field("grammar", description="a grammar file")
    grammar: Path = Field(description="YAML file of the grammar")

    def load(self) -> Grammar:
        """Read the grammar; raises `Refused` with the file's name."""
        return load_grammar(self.grammar)

    def identity(self) -> str:
        """What the prompts depend on."""
        return hashlib.sha256(self.load().model_dump_json().encode()).hexdigest()

    def endless(self, seed: int) -> Iterator[Prompt]:
        """Prompts 0, 1, 2, ... of this seed."""
        grammar, index = self.load(), 0
        while True:
            yield grammar.prompt(seed, index)
            index += 1


class FileSource(Strict):
    """Sentences from a text file, one a line, or `class<TAB>sentence`; read round and round with fresh seeds."""

    source: Literal["file"] = Field("file", description="a text file")
    path: Path = Field(description="text file, one prompt a line, optionally class<TAB>prompt")

    def lines(self) -> list[str]:
        """The file's non-empty lines; raises `Refused` when there are none."""
        if not self.path.is_file():
            raise Refused(f"prompts.path: {self.path} does not exist - name a text file with one prompt a line")
        lines = [line.strip() for line in self.path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not lines:
            raise Refused(f"prompts.path: {self.path} holds no prompt - write one a line")
        return lines

    def identity(self) -> str:
        """What the prompts depend on."""
        return hashlib.sha256("\n".join(self.lines()).encode()).hexdigest()

    def endless(self, seed: int) -> Iterator[Prompt]:
        """The lines in order, again and again, each time with another picture seed."""
        lines, index = self.lines(), 0
        while True:
            class_name, _, text = lines[index % len(lines)].rpartition("\t")
            yield Prompt(text, class_name or "prompt", derived_seed("picture", seed, index))
            index += 1


PromptSource = Annotated[GrammarSource | FileSource, Field(discriminator="source")]


def source_identity(source: GrammarSource | FileSource, seed: int) -> dict[str, JsonValue]:
    """What a list of prompts depends on, for a recipe."""
    return {"source": source.source, "sha256": source.identity(), "seed": seed}


def prompts(source: GrammarSource | FileSource, seed: int, split: Split, count: int) -> list[Prompt]:
    """The first `count` prompts of a split; a longer list begins with the shorter one.

    Raises `Refused` when the source has no sentence of that split (looked for among 1000 times as many).
    """
    found: list[Prompt] = []
    for tried, prompt in enumerate(source.endless(seed)):
        if len(found) == count:
            break
        if tried > 1000 * (count + VALIDATION_ONE_IN):
            raise Refused(f"prompts: {len(found)} of {count} {split} prompts found - the source has too few sentences")
        if split_of(prompt.text) == split:
            found.append(prompt)
    return found


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
