"""How well pictures show what their sentences say, by the judge."""

from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from stages.tiny.judge import AttributeClassifier, load_classifier
from stages.tiny.world import ATTRIBUTES, parse_attributes, world_grammar


@lru_cache(maxsize=1)
def attribute_classifier() -> AttributeClassifier:
    """The shipped judge, loaded once."""
    return load_classifier()


def score(texts: Sequence[str], pictures: Float[Tensor, "b 3 64 64"]) -> Mapping[str, Float[Tensor, " b"]]:
    """Attribute -> 1 where the picture (in [0, 1]) shows the word said, 0 where not, nan where nothing was said."""
    seen = attribute_classifier().predict(pictures.float().cpu() * 2 - 1)
    said = [parse_attributes(text) for text in texts]
    return {
        name: torch.tensor([word_score(name, words, int(index)) for words, index in zip(said, seen[:, i], strict=True)])
        for i, name in enumerate(ATTRIBUTES)
    }


def word_score(name: str, stated: Mapping[str, str], predicted: int) -> float:
    """1, 0 or nan for one attribute of one picture."""
    return float("nan") if name not in stated else float(world_grammar().words_of(name)[predicted] == stated[name])


def accuracies(scores: Mapping[str, Float[Tensor, " b"]]) -> dict[str, float]:
    """Mean of each attribute where it was said, and the share of pictures with everything right (`all`)."""
    wrong = torch.stack([value == 0 for value in scores.values()])
    return {name: float(value.nanmean()) for name, value in scores.items()} | {
        "all": float((~wrong.any(0)).float().mean())
    }
