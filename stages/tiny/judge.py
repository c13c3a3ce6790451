"""The judge: a small network that reads shape, colour, size, place and background back from a picture."""

from itertools import pairwise
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor, nn

from stages.tiny.world import ATTRIBUTES, world_grammar

FILE = Path(__file__).with_name("model") / "judge" / "judge.safetensors"


class AttributeClassifier(nn.Module):
    """Pictures [b, 3, 64, 64] in [-1, 1] -> one row of logits per attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = [len(world_grammar().words_of(name)) for name in ATTRIBUTES]
        widths = (3, 16, 32, 64, 64)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.SiLU()]
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4 * 4, 128), nn.SiLU())
        self.head = nn.Linear(128, sum(self.counts))

    def forward(self, pictures: Float[Tensor, "b 3 h w"]) -> tuple[Float[Tensor, "b n"], ...]:
        """Logits of every attribute, in the order of ATTRIBUTES."""
        logits: Tensor = self.head(self.trunk(pictures))
        return tuple(logits.split(self.counts, dim=1))

    @torch.inference_mode()
    def predict(self, pictures: Float[Tensor, "b 3 h w"]) -> Int[Tensor, "b 5"]:
        """The most likely word of each attribute, as indices."""
        return torch.stack([logits.argmax(1) for logits in self(pictures)], dim=1)


def load_classifier() -> AttributeClassifier:
    """The shipped judge, ready to judge."""
    net = AttributeClassifier()
    net.load_state_dict({name: value.float() for name, value in load_file(FILE).items()})
    return net.eval().requires_grad_(False)
