"""The embedded world: a sentence names attributes of a 64x64 picture; those that it leaves out are random."""

import math
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw

from stages.prompts import Grammar, Prompt, load_grammar
from stages.tiny.scenes import PIXELS, Scenes, World

OVERSAMPLING = 4
ATTRIBUTES = ("size", "colour", "shape", "place", "background")
RADIUS = {"small": 13.0, "large": 20.0}
CENTRE = {"left": (20, 32), "right": (44, 32), "top": (32, 20), "bottom": (32, 44), "middle": (32, 32)}
COLOUR = {
    "red": (220, 30, 30), "orange": (250, 135, 10), "yellow": (250, 225, 30), "green": (15, 130, 45),
    "cyan": (20, 205, 220), "blue": (25, 50, 215), "purple": (120, 30, 175), "pink": (250, 110, 185),
    "brown": (120, 65, 25), "lime": (130, 235, 30),
}  # fmt: skip
BACKGROUND = {
    "white": (246, 246, 246), "gray": (150, 150, 155), "black": (18, 18, 22), "blue": (170, 205, 250),
    "green": (190, 235, 195),
}  # fmt: skip

Point = tuple[float, float]


def world_grammar() -> Grammar:
    """The sentences of this world."""
    return load_grammar(Path(__file__).with_name("grammar.yaml"))


def regular_polygon(corners: int, inner: float = 1.0, turn: float = 0.0) -> list[Point]:
    """A polygon on the unit circle, pointing up; every second corner at radius `inner`."""
    radii = [1.0 if i % 2 == 0 else inner for i in range(corners)]
    angles = [2 * math.pi * i / corners + turn for i in range(corners)]
    return [(r * math.sin(a), -r * math.cos(a)) for r, a in zip(radii, angles, strict=True)]


def heart() -> list[Point]:
    """The usual parametric heart, scaled into the unit circle."""
    ts = [2 * math.pi * i / 60 for i in range(60)]
    xs = [16 * math.sin(t) ** 3 for t in ts]
    ys = [13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) for t in ts]
    return [(x / 16.5, -(y + 2.5) / 15.5) for x, y in zip(xs, ys, strict=True)]


def moon() -> list[Point]:
    """A crescent open to the right: a disc of radius 1 less a disc of radius 0.85 that sits 0.62 to its right."""
    reach = math.acos((1 + 0.62**2 - 0.85**2) / (2 * 0.62))
    outer = [reach + (2 * math.pi - 2 * reach) * i / 40 for i in range(41)]
    arc = [(math.cos(a), math.sin(a)) for a in outer]
    bite = math.atan2(math.sin(reach), math.cos(reach) - 0.62)
    inner = [-bite + (2 * bite - 2 * math.pi) * i / 40 for i in range(41)]
    return arc + [(0.62 + 0.85 * math.cos(a), 0.85 * math.sin(a)) for a in inner]


ARM = 0.36
OUTLINE: dict[str, list[Point]] = {
    "circle": regular_polygon(60),
    "ring": regular_polygon(60),
    "square": [(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)],
    "triangle": [(0, -1.0), (0.95, 0.75), (-0.95, 0.75)],
    "diamond": [(0, -1.05), (0.72, 0), (0, 1.05), (-0.72, 0)],
    "cross": [(-ARM, -1), (ARM, -1), (ARM, -ARM), (1, -ARM), (1, ARM), (ARM, ARM),
              (ARM, 1), (-ARM, 1), (-ARM, ARM), (-1, ARM), (-1, -ARM), (-ARM, -ARM)],
    "star": regular_polygon(10, inner=0.45),
    "heart": heart(),
    "moon": moon(),
    "hourglass": [(-0.85, -0.95), (0.85, -0.95), (0.12, 0), (0.85, 0.95), (-0.85, 0.95), (-0.12, 0)],
}  # fmt: skip
RING_HOLE = 0.55


@dataclass(frozen=True)
class Scene:
    """Everything a picture shows."""

    size: str
    colour: str
    shape: str
    place: str
    background: str


def parse_attributes(text: str) -> dict[str, str]:
    """The attributes that a sentence of this world names: attribute -> word."""
    words = text.split()
    attributes: dict[str, str] = {}
    if "background" in words:
        place = words.index("background")
        attributes["background"] = words[place - 1]
        words = words[: place - 1]
    for name in ("size", "colour", "shape", "place"):
        for word in words:
            if word in world_grammar().words_of(name):
                attributes[name] = word
    return attributes


def sample_scene(prompt: Prompt) -> tuple[Scene, random.Random]:
    """A scene that fits the sentence, and the generator with which it is drawn."""
    rng = random.Random(prompt.seed)
    free = {name: rng.choice(world_grammar().words_of(name)) for name in ATTRIBUTES}
    return Scene(**{**free, **parse_attributes(prompt.text)}), rng


def draw_scene(scene: Scene, rng: random.Random) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """The picture [64, 64, 3] and the coverage of its shape [64, 64], anti-aliased, with slight free variations."""
    x, y = (c + rng.uniform(-2, 2) for c in CENTRE[scene.place])
    radius = RADIUS[scene.size] * rng.uniform(0.95, 1.05)
    shade = rng.uniform(0.92, 1.04)
    canvas = Image.new("L", (PIXELS * OVERSAMPLING,) * 2)
    pen = ImageDraw.Draw(canvas)

    def outline(scale: float) -> list[Point]:
        points = OUTLINE[scene.shape]
        return [((x + scale * px) * OVERSAMPLING, (y + scale * py) * OVERSAMPLING) for px, py in points]

    pen.polygon(outline(radius), fill=255)
    if scene.shape == "ring":
        pen.polygon(outline(radius * RING_HOLE), fill=0)
    coverage = np.asarray(canvas.reduce(OVERSAMPLING))
    alpha = coverage[..., None].astype(np.float32) / 255
    front, back = np.array(COLOUR[scene.colour]), np.array(BACKGROUND[scene.background])
    picture = np.clip((alpha * front + (1 - alpha) * back) * shade, 0, 255)
    return picture.round().astype(np.uint8), coverage


def label(scene: Scene) -> list[int]:
    """The index of each attribute's word, in the order of ATTRIBUTES."""
    return [world_grammar().words_of(name).index(getattr(scene, name)) for name in ATTRIBUTES]


def draw_scenes(count: int, seed: int) -> Scenes:
    """The pictures of the first `count` training sentences of a seed."""
    prompts = [world_grammar().prompt(seed, index) for index in range(count)]
    pictures, coverage, labels = [], [], []
    for prompt in prompts:
        scene, rng = sample_scene(prompt)
        picture, covered = draw_scene(scene, rng)
        pictures.append(torch.from_numpy(picture).permute(2, 0, 1))
        coverage.append(torch.from_numpy(covered.copy()))
        labels.append(torch.tensor(label(scene)))
    texts = tuple(prompt.text for prompt in prompts)
    return Scenes(torch.stack(pictures), torch.stack(coverage), torch.stack(labels), texts)


EMBEDDED = World(
    grammar_file=Path(__file__).with_name("grammar.yaml"),
    attributes=ATTRIBUTES,
    draw=draw_scenes,
    parse=lambda _grammar, text: parse_attributes(text),
)
