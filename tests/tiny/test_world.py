"""Laws of the embedded world."""

import random

import numpy as np

from stages.prompts import Prompt
from stages.tiny.world import (
    ATTRIBUTES,
    BACKGROUND,
    COLOUR,
    Scene,
    draw_scene,
    label,
    parse_attributes,
    sample_scene,
    world_grammar,
)


def test_a_sentence_is_read_back_word_for_word() -> None:
    for index in range(200):
        prompt = world_grammar().prompt(5, index)
        assert (
            world_grammar().compose(
                {name: parse_attributes(prompt.text)[name] for name in ORDER if name in parse_attributes(prompt.text)}
            )
            == prompt.text
        )


ORDER = tuple(phrase.name for phrase in world_grammar().phrases)


def test_every_word_can_be_drawn() -> None:
    assert set(COLOUR) == set(world_grammar().words_of("colour"))
    assert set(BACKGROUND) == set(world_grammar().words_of("background"))


def test_a_scene_shows_what_its_sentence_names_and_fills_in_the_rest() -> None:
    scene, _ = sample_scene(Prompt("a blue star on a green background", "star/blue", 3))
    assert (scene.colour, scene.shape, scene.background) == ("blue", "star", "green")
    others = {
        sample_scene(Prompt("a blue star on a green background", "star/blue", seed))[0].place for seed in range(60)
    }
    assert others == set(world_grammar().words_of("place"))


def test_the_same_seed_draws_the_same_picture() -> None:
    scene = Scene("small", "red", "heart", "left", "white")
    one, other = (draw_scene(scene, random.Random(seed))[0] for seed in (1, 1))
    assert np.array_equal(one, other)
    assert not np.array_equal(one, draw_scene(scene, random.Random(2))[0])


def test_shapes_have_the_named_place_and_colour() -> None:
    picture, coverage = draw_scene(Scene("large", "red", "square", "left", "white"), random.Random(0))
    rows, columns = np.nonzero(coverage > 128)
    assert columns.mean() < 26
    assert abs(rows.mean() - 32) < 3
    red, green, _ = picture[rows, columns].mean(0)
    assert red > 2 * green


def test_edges_are_anti_aliased() -> None:
    _, coverage = draw_scene(Scene("large", "red", "circle", "middle", "white"), random.Random(0))
    assert len(np.unique(coverage)) > 10


def test_labels_follow_the_order_of_the_attributes() -> None:
    scene = Scene("small", "red", "heart", "left", "white")
    words = [world_grammar().words_of(name)[index] for name, index in zip(ATTRIBUTES, label(scene), strict=True)]
    assert words == ["small", "red", "heart", "left", "white"]
