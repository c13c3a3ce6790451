"""What a teacher is fitted to: pictures with sentences and labels, and the world that draws them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from stages.prompts import Grammar, load_grammar

PIXELS = 64


@dataclass(frozen=True)
class Scenes:
    """Pictures of a world, with the coverage of what they show, the labels of their attributes and their sentences."""

    pictures: UInt8[Tensor, "n 3 h w"]
    coverage: UInt8[Tensor, "n h w"]
    labels: Int[Tensor, "n a"]
    """index of each attribute's word; -1 where no word of the attribute applies"""
    texts: tuple[str, ...]

    def sample_rows(self, generator: torch.Generator, count: int) -> Int[Tensor, " count"]:
        """Random rows."""
        return torch.randint(len(self.texts), (count,), generator=generator)

    def normalised(self, rows: Int[Tensor, " b"]) -> Float[Tensor, "b 3 h w"]:
        """Pictures in [-1, 1]."""
        return self.pictures[rows].float() / 127.5 - 1


def parse_by_words(grammar: Grammar, text: str) -> dict[str, str]:
    """The attributes that a sentence names, where no word belongs to two phrases: attribute -> word."""
    words = text.split()
    return {phrase.name: word for phrase in grammar.phrases for word in words if word in phrase.words}


@dataclass(frozen=True)
class World:
    """Sentences and the pictures that belong to them."""

    grammar_file: Path
    attributes: tuple[str, ...]
    """names of phrases of the grammar, in the order of labels"""
    draw: Callable[[int, int], Scenes]
    """(count, seed) -> the pictures of the first `count` sentences of a seed"""
    parse: Callable[[Grammar, str], dict[str, str]] = parse_by_words

    def grammar(self) -> Grammar:
        """The sentences of this world."""
        return load_grammar(self.grammar_file)

    def words(self, attribute: str) -> tuple[str, ...]:
        """The words of an attribute."""
        return self.grammar().words_of(attribute)

    def named(self, text: str) -> dict[str, str]:
        """The attributes that a sentence names: attribute -> word."""
        return self.parse(self.grammar(), text)
