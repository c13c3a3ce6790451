"""The classifier of a world's attributes, and how well pictures show the attributes that their sentences name."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor, nn

from stages.tiny.scenes import PIXELS, World

UNNAMED = -1
"""The label where no word of an attribute applies."""


class AttributeClassifier(nn.Module):
    """Pictures [b, 3, 64, 64] in [-1, 1] -> one row of logits per attribute."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.counts = [len(world.words(name)) for name in world.attributes]
        layers: list[nn.Module] = []
        for before, after in pairwise((3, 16, 32, 64, 64)):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.SiLU()]
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4 * 4, 128), nn.SiLU())
        self.head = nn.Linear(128, sum(self.counts))

    def forward(self, pictures: Float[Tensor, "b 3 h w"]) -> tuple[Float[Tensor, "b n"], ...]:
        """Logits of every attribute, in the world's order."""
        logits: Tensor = self.head(self.trunk(pictures))
        return tuple(logits.split(self.counts, dim=1))

    @torch.inference_mode()
    def predict(self, pictures: Float[Tensor, "b 3 h w"]) -> Int[Tensor, "b a"]:
        """The most likely word of each attribute, as indices."""
        return torch.stack([logits.argmax(1) for logits in self(pictures)], dim=1)


def load_judge(world: World, file: Path) -> AttributeClassifier:
    """A stored classifier, frozen."""
    net = AttributeClassifier(world)
    net.load_state_dict({name: value.float() for name, value in load_file(file).items()})
    return net.eval().requires_grad_(False)


def judge_pictures(
    world: World, net: AttributeClassifier, texts: Sequence[str], pictures: Float[Tensor, "b 3 h w"]
) -> Mapping[str, Float[Tensor, " b"]]:
    """Attribute -> 1 where the picture (in [0, 1]) shows the named word, 0 where not, nan where none is named.

    Pictures of another size than 64 x 64 get nan throughout: the classifier was trained on that alone, and of the
    teacher's own pictures of other sizes, resized or cropped, it would call at most a third right.
    """
    if pictures.shape[-2:] != (PIXELS, PIXELS):
        return {name: torch.full([len(texts)], math.nan) for name in world.attributes}
    predicted = net.predict(pictures.float().cpu() * 2 - 1).tolist()
    scores: dict[str, list[float]] = {name: [] for name in world.attributes}
    for text, indices in zip(texts, predicted, strict=True):
        named = world.named(text)
        for name, index in zip(world.attributes, indices, strict=True):
            scores[name].append(float(world.words(name)[index] == named[name]) if name in named else math.nan)
    return {name: torch.tensor(values) for name, values in scores.items()}


@torch.inference_mode()
def judge_features(net: AttributeClassifier, pictures: Float[Tensor, "b 3 64 64"]) -> Float[Tensor, "b 128"]:
    """What the classifier judges from, of pictures in [0, 1]: for distances between sets of them."""
    rows: Tensor = net.trunk(pictures.float().cpu() * 2 - 1)
    return rows


def accuracies(scores: Mapping[str, Float[Tensor, " b"]]) -> dict[str, float]:
    """Mean of each attribute where it is named, and the share of pictures with everything right (`all`)."""
    any_wrong = torch.stack([value == 0 for value in scores.values()]).any(0)
    means = {name: float(value.nanmean()) for name, value in scores.items()}
    return means | {"all": float((~any_wrong).float().mean())}
