"""A published cache opens in other people's loaders, offline, with the card's own configuration."""

import json
from dataclasses import replace

import datasets
import pytest
import webdataset
import yaml
from safetensors.torch import load

from shards.__main__ import main
from shards.manifest import Manifest, Recipe
from shards.publish import CARD_FILE, size_category
from shards.writer import CacheWriter
from stages.system.refusal import Refused


@pytest.fixture
def published(cache):
    assert main(["export-index", str(cache), "--license", "mit", "--name", "stars"]) == 0
    return cache


def test_it_is_opened_by_datasets_with_every_record(published, tmp_path):
    whole = datasets.load_dataset(str(published), cache_dir=str(tmp_path / "arrow"))
    counts = {split: sum(shard.records for shard in Manifest.open(published).shards_of(split)) for split in whole}
    assert {split: len(rows) for split, rows in whole.items()} == counts == {"train": 7, "validation": 2}
    types = {name: feature.dtype for name, feature in whole["train"].features["json"].items() if name != "blocks"}
    assert types == {
        "class_name": "string",
        "draws": "int64",
        "guidance_scale": "float64",
        "height": "int64",
        "key": "string",
        "schema_version": "int64",
        "seed": "int64",
        "text": "string",
        "width": "int64",
    }
    assert [row["json"]["guidance_scale"] for row in whole["train"]] == [3.0 + i for i in range(7)]
    assert load(whole["validation"][1]["safetensors"])["x_t"].shape == (2, 3, 4, 5)


def test_it_is_streamed_by_datasets_with_every_record(published):
    rows = list(datasets.load_dataset(str(published), split="train", streaming=True))
    assert [row["__key__"] for row in rows] == [f"{i:09d}" for i in range(7)]
    assert all(set(row["json"]) == set(rows[0]["json"]) for row in rows)


def test_values_that_the_first_five_records_do_not_announce_are_kept(tmp_path, make_recipe, make_record):
    """Columns are typed by the first five: whole numbers or nothing there must not cut what comes later."""
    early = [replace(make_record(i), guidance_scale=3, class_name="", text="") for i in range(5)]
    late = [replace(make_record(i), guidance_scale=4.5) for i in (5, 6)]
    CacheWriter(tmp_path / "cache", make_recipe()).add("train", 0, [*early, *late])
    main(["export-index", str(tmp_path)])
    rows = datasets.load_dataset(str(tmp_path / "cache"), split="train", cache_dir=str(tmp_path / "arrow"))
    assert [row["json"]["guidance_scale"] for row in rows] == [3.0] * 5 + [4.5] * 2
    assert rows[6]["json"]["text"] == "a star, number 6"


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its files to the garbage collector
def test_the_lists_of_shards_lead_webdataset_to_every_record(published):
    for split, records in (("train", 7), ("validation", 2)):
        index = json.loads((published / f"wids-{split}.json").read_text())
        assert (index["wids_version"], index["length"]) == (1, records)
        urls = [str(published / shard["url"]) for shard in index["shardlist"]]
        assert len(list(webdataset.WebDataset(urls, shardshuffle=False))) == records
        assert [shard["nsamples"] for shard in index["shardlist"]] == [
            s.records for s in Manifest.open(published).shards_of(split)
        ]


def test_the_card_has_the_head_of_a_dataset_and_states_the_facts(published):
    _, head, body = (published / CARD_FILE).read_text().split("---\n", 2)
    facts = yaml.safe_load(head)
    assert facts["configs"] == [
        {
            "config_name": "default",
            "data_files": [
                {"split": "train", "path": "data/train-*.tar"},
                {"split": "validation", "path": "data/validation-*.tar"},
            ],
        }
    ]
    assert (facts["license"], facts["size_categories"], facts["viewer"]) == ("mit", ["n<1K"], False)
    assert "| shape/star | 3 |" in body
    assert "| safetensors | `v_cond` | float16 | K x 3 x 4 x 5 |" in body
    assert Manifest.open(published).recipe.fingerprint() in body


def test_no_path_of_this_machine_is_published(tmp_path, make_record):
    for place in ("/home/somebody/model", "models/sd15"):
        recipe = Recipe(identity={"steps": 1}, information={"teacher_location": place})
        CacheWriter(tmp_path / place[-4:], recipe).add("train", 0, [make_record(0)])
        main(["export-index", str(tmp_path / place[-4:])])
        card = (tmp_path / place[-4:] / CARD_FILE).read_text()
        assert place not in card
        assert str(tmp_path) not in card


def test_verify_accepts_what_was_added_and_writing_it_again_changes_nothing(published):
    assert main(["verify", str(published)]) == 0
    before = (published / CARD_FILE).read_bytes()
    main(["export-index", str(published), "--license", "mit", "--name", "stars"])
    assert (published / CARD_FILE).read_bytes() == before


def test_a_readme_of_somebody_else_is_not_written_over(cache):
    (cache / CARD_FILE).write_text("mine")
    with pytest.raises(Refused, match=r"README\.md: was not written by this command"):
        main(["export-index", str(cache)])
    assert (cache / CARD_FILE).read_text() == "mine"


@pytest.mark.parametrize(
    ("records", "word"), [(1, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (50_500, "10K<n<100K"), (10**7, "n>10M")]
)
def test_sizes_are_the_hubs_words(records, word):
    assert size_category(records) == word
