"""Laws of a fitted David in a folder: loaded unchanged, and only for the features that it was fitted to."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.values import PictureSize
from shards.manifest import Manifest, Recipe
from shards.record import BlockFeatures, Record, States
from shards.table import Table, write_table
from shards.writer import CacheWriter
from stages.david.assessment import assess, reduce
from stages.david.block_model import FitConfig
from stages.david.fit import fit, fit_identity
from stages.david.patterns import split_rows
from stages.david.saved_assessor import load, load_or_fit, save
from stages.system.refusal import Refused

CONFIG = FitConfig(bins=5, patterns=3, dimensions=6, steps=3, batch_size=16)


def recipe(**changes):
    content = {
        "hook_point": "last resnet",
        "teacher": {"unet": "ab12"},
        "blocks": {"mid": 6, "down_0": 4},
        "prompts": 1,
    }
    return Recipe(identity=content | changes)


def record(number):
    generator = torch.Generator().manual_seed(number)

    def half(*shape):
        return torch.randn(*shape, generator=generator).half()

    k = torch.randint(0, 1000, (3,), generator=generator)
    states = States(
        k, k / 1000, half(3, 2, 3, 4), half(3, 2, 3, 4), half(3, 2, 3, 4), torch.tensor([True, True, False])
    )
    features = BlockFeatures({"mid": half(3, 6), "down_0": half(3, 4)})
    head, size = (f"{number:09d}", f"number {number}", "one", number, 5.0), PictureSize(32, 24)
    return Record(*head, half(2, 3), half(2, 3, 4), states, features, size)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "cache"
    writer = CacheWriter(folder, recipe())
    writer.add("train", 0, (record(number) for number in range(30)))
    writer.add("validation", 0, (record(number) for number in range(5)))
    write_table(folder)
    return folder


@pytest.fixture
def folder(cache, tmp_path):
    save(fit(cache, CONFIG, 1000, print_line=lambda _line: None), tmp_path / "david")
    return tmp_path / "david"


def test_a_saved_david_is_loaded_unchanged(cache, folder):
    david, back = fit(cache, CONFIG, 1000, print_line=lambda _line: None), load(folder, recipe())
    assert (back.blocks, back.bins, back.patterns, back.fit_metrics) == (("mid", "down_0"), 5, 3, david.fit_metrics)
    features, bins = torch.randn(4, 6), torch.tensor([0, 1, 4, 4])
    for name in ("log_bins", "log_patterns", "inclusion"):
        assert getattr(back.posterior("mid", features, bins), name).equal(
            getattr(david.posterior("mid", features, bins), name)
        )
    assert back.references().equal(david.references())
    assert back.is_reliable("mid", bins).equal(david.is_reliable("mid", bins))


def test_the_same_cache_and_seed_give_the_same_bytes(cache, folder, tmp_path):
    save(fit(cache, CONFIG, 1000, print_line=lambda _line: None), tmp_path / "again")
    for name in ("david.safetensors", "config.json"):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_a_david_is_fitted_once(cache, tmp_path, capsys):
    load_or_fit(tmp_path, cache, CONFIG, 1000)
    assert "mid" in capsys.readouterr().out
    load_or_fit(tmp_path, cache, CONFIG, 1000)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hook_point": "whole block"}, 'hook_point was "last resnet", is now "whole block"'),
        ({"teacher": {"unet": "cd34"}}, 'teacher.unet was "ab12", is now "cd34"'),
        ({"prompts": 2}, "cache was "),
    ],
)
def test_features_of_another_cache_are_refused_by_name(folder, changes, named):
    with pytest.raises(Refused, match="fitted to something else") as refused:
        load(folder, recipe(**changes))
    assert named in str(refused.value)


def test_another_configuration_is_refused_by_name(cache, folder):
    with pytest.raises(Refused, match=r"fit\.seed was 0, is now 1"):
        load_or_fit(folder, cache, CONFIG.model_copy(update={"seed": 1}), 1000)


def test_a_cache_without_a_hook_point_is_refused():
    with pytest.raises(Refused, match="no hook_point"):
        fit_identity(Recipe(identity={"teacher": {}}), CONFIG)


def change_weights(folder, change):
    """Change the weights, and their hash in config.json."""
    path, facts = folder / "david.safetensors", folder / "config.json"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    content = json.loads(facts.read_text())
    content["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    facts.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda tensors: tensors.pop("mid.bins.vertices"), "mid.bins.vertices: missing"),
        (lambda tensors: tensors.update({"mid.extra": torch.ones(1)}), "holds mid.extra, which no block has"),
        (lambda tensors: tensors.update({"mid.mean": torch.ones(7)}), r"mid.mean: torch.float32 \[7\], not"),
    ],
)
def test_every_tensor_must_be_there_and_no_other(folder, change, named):
    change_weights(folder, change)
    with pytest.raises(Refused, match=named):
        load(folder, recipe())


def test_weights_of_another_hash_are_refused(folder):
    tensors = load_file(folder / "david.safetensors")
    save_file({name: value + 1 for name, value in tensors.items()}, folder / "david.safetensors")
    with pytest.raises(Refused, match=r"not the weights that config\.json names"):
        load(folder, recipe())


def test_a_block_of_another_width_or_name_is_refused(folder):
    david = load(folder, recipe())
    with pytest.raises(Refused, match="block mid: 5 channels, David was fitted to 6"):
        david.posterior("mid", torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(Refused, match="block down_1: David was not fitted to it - did you mean down_0"):
        david.posterior("down_1", torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64))


def test_every_block_is_assessed_and_the_teachers_own_features_have_no_error(folder):
    david, bins = load(folder, recipe()), torch.tensor([0, 4, 2])
    features = {"mid": torch.randn(3, 6), "down_0": torch.randn(3, 4), "up_0": torch.randn(3, 9)}
    assessed = assess(david, features, features, bins)
    assert list(assessed) == ["mid", "down_0"]
    mean = reduce(assessed, david.bins)
    assert [getattr(mean, name).tolist() for name in ("timestep_error", "pattern_error", "coherence")] == [
        [0, 0],
        [0, 0],
        [1, 1],
    ]


def test_features_that_are_not_finite_are_refused_by_block(cache, monkeypatch):
    monkeypatch.setattr(Table, "features", lambda _self, _block, rows: torch.full((len(rows), 4), torch.inf))
    with pytest.raises(Refused, match="block mid: the cache holds features that are not finite"):
        fit(cache, CONFIG, 1000, print_line=lambda _line: None)


def test_no_prompt_is_in_two_parts(cache):
    table = Table.open(cache)
    rows = split_rows(table, 1 / 3, 1000, 0)
    training, tuning = (set(table.key[part].tolist()) for part in (rows.training, rows.tuning))
    assert (len(training), len(tuning), len(rows.validation)) == (20, 10, 15)
    assert not training & tuning


def test_at_most_max_states_are_for_training(cache):
    assert len(split_rows(Table.open(cache), 1 / 3, 30, 0).training) == 30


def test_a_cache_without_validation_prompts_is_refused(tmp_path):
    writer = CacheWriter(tmp_path, recipe())
    writer.add("train", 0, (record(number) for number in range(6)))
    write_table(tmp_path)
    assert Manifest.open(tmp_path).table
    with pytest.raises(Refused, match="too few prompts in the validation split"):
        fit(tmp_path, CONFIG, 1000)


def test_a_david_without_stored_steps_has_a_thousand_and_is_refused_for_another_teacher(folder, cache):
    path = folder / "config.json"
    content = json.loads(path.read_text())
    del content["steps"]
    path.write_text(json.dumps(content))
    assert load_or_fit(folder, cache, CONFIG, 1000).steps == 1000
    with pytest.raises(Refused, match="David's bins are of 1000 steps, the teacher has 4000 - remove"):
        load_or_fit(folder, cache, CONFIG, 4000)


def test_more_bins_than_steps_are_refused(cache):
    with pytest.raises(Refused, match=f"david.fit.bins = {CONFIG.bins}: the teacher has 2 steps"):
        fit(cache, CONFIG, 2)
