"""How well pictures show what their sentences say, by the judge."""

from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from stages.tiny.judge import JudgeNet, load_net
from stages.tiny.world import ATTRIBUTES, grammar, read


@lru_cache(maxsize=1)
def judge() -> JudgeNet:
    """The shipped judge, loaded once."""
    return load_net()


def score(texts: Sequence[str], pictures: Float[Tensor, "b 3 64 64"]) -> Mapping[str, Float[Tensor, " b"]]:
    """Attribute -> 1 where the picture (in [0, 1]) shows the word said, 0 where not, nan where nothing was said."""
    seen = judge().attributes(pictures.float().cpu() * 2 - 1)
    said = [read(text) for text in texts]
    return {
        name: torch.tensor([agreement(name, words, int(index)) for words, index in zip(said, seen[:, i], strict=True)])
        for i, name in enumerate(ATTRIBUTES)
    }


def agreement(name: str, said: Mapping[str, str], seen: int) -> float:
    """1, 0 or nan for one attribute of one picture."""
    return float("nan") if name not in said else float(grammar().words_of(name)[seen] == said[name])


def shares(scores: Mapping[str, Float[Tensor, " b"]]) -> dict[str, float]:
    """Mean of each attribute where it was said, and the share of pictures with everything right (`all`)."""
    wrong = torch.stack([value == 0 for value in scores.values()])
    return {name: float(value.nanmean()) for name, value in scores.items()} | {
        "all": float((~wrong.any(0)).float().mean())
    }
