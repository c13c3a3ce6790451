"""The judge of the embedded world: `scorer: stages.tiny.score.score`, `features: stages.tiny.score.features`."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from stages.tiny.judge import AttributeClassifier, accuracies, judge_features, judge_pictures, load_judge
from stages.tiny.world import EMBEDDED

__all__ = ["accuracies", "features", "load_classifier", "score"]

FILE = Path(__file__).with_name("model") / "judge" / "judge.safetensors"


@lru_cache(maxsize=1)
def load_classifier() -> AttributeClassifier:
    """The shipped classifier, frozen and loaded once."""
    return load_judge(EMBEDDED, FILE)


def score(texts: Sequence[str], pictures: Float[Tensor, "b 3 h w"]) -> Mapping[str, Float[Tensor, " b"]]:
    """Attribute -> 1 where the picture (in [0, 1]) shows the named word, 0 where not, nan where none is named."""
    return judge_pictures(EMBEDDED, load_classifier(), texts, pictures)


def features(pictures: Float[Tensor, "b 3 64 64"]) -> Float[Tensor, "b 128"]:
    """What the classifier judges from, of pictures in [0, 1]: for distances between sets of them."""
    return judge_features(load_classifier(), pictures)
