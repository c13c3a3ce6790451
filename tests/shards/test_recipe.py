import hashlib

import pytest

from shards.manifest import Recipe, differences


def recipe(**identity):
    return Recipe(identity=identity)


@pytest.mark.parametrize("schema", [1, 2])
def test_the_fingerprint_holds_identity_and_schema(schema):
    made = recipe(teacher={"unet": "ab"}, steps=25, guidance=5.0).in_schema(schema)
    content = b'{"identity":{"guidance":5.0,"steps":25,"teacher":{"unet":"ab"}},"schema_version":%d}' % schema
    assert made.fingerprint() == hashlib.sha256(content).hexdigest()


def test_the_fingerprint_does_not_depend_on_the_order_of_fields():
    assert recipe(a=1, b={"c": 2, "d": 3}).fingerprint() == recipe(b={"d": 3, "c": 2}, a=1).fingerprint()


def test_information_does_not_count():
    here = Recipe(identity={"a": 1}, information={"torch": "2.13", "place": "/here"})
    there = Recipe(identity={"a": 1}, information={"torch": "2.14"})
    assert here.fingerprint() == there.fingerprint()
    assert differences(here, there) == []


def test_differences_name_dotted_fields_with_both_values():
    a = recipe(sampling={"steps": 25, "eta": 0.0}, blocks=["mid"], old=None)
    b = recipe(sampling={"steps": 30, "eta": 0.0}, blocks=["mid", "up_0"], new=True)
    assert differences(a, b) == [
        "sampling.steps was 25, is now 30",
        'blocks was ["mid"], is now ["mid","up_0"]',
        "old was null, is now absent",
        "new was absent, is now true",
    ]


def test_differences_inside_a_list_of_mappings_name_the_entry_that_differs():
    sizes = [{"size": "512x512", "share": 0.4}, {"size": "512x768", "share": 0.6}]
    a, b = recipe(render={"sizes": sizes}), recipe(render={"sizes": [sizes[0], {"size": "768x512", "share": 0.6}]})
    assert differences(a, b) == ['render.sizes.1.size was "512x768", is now "768x512"']
    assert differences(a, recipe(render={"sizes": sizes[:1]})) == [
        'render.sizes.1.size was "512x768", is now absent',
        "render.sizes.1.share was 0.6, is now absent",
    ]
    assert differences(recipe(sizes=[]), recipe(sizes=[{}])) == [
        "sizes was [], is now absent",
        "sizes.0 was absent, is now {}",
    ]


def test_whole_numbers_and_floats_differ_in_both_views():
    a, b = recipe(w=5), recipe(w=5.0)
    assert a.fingerprint() != b.fingerprint()
    assert differences(a, b) == ["w was 5, is now 5.0"]


def test_equal_fingerprints_and_no_differences_are_the_same_thing():
    pairs = [({"a": {}}, {}), ({"a": {"b": 1}}, {"a.b": 2}), ({"a": [1, 2]}, {"a": [2, 1]}), ({"a": True}, {"a": 1})]
    for a, b in pairs:
        assert differences(Recipe(identity=a), Recipe(identity=b))
        assert Recipe(identity=a).fingerprint() != Recipe(identity=b).fingerprint()
