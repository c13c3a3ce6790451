"""Laws of the list of pictures: what is taken from the cache, painted or photographed, and what a recipe tells."""

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from transformers import CLIPTokenizer

from benchmarks.forge import record
from shards.manifest import Recipe
from shards.writer import CacheWriter
from stages.classes import ClassFile
from stages.classes.pictures import CachedPrompt, PicturePlan, PicturesConfig, plan_pictures
from stages.prompts import FileSource, GrammarSource
from stages.system.refusal import Refused

SOURCE = GrammarSource(grammar=Path("stages/tiny/grammar.yaml"))
STARS = {"name": "stars", "pattern": "star/*", "priority": "top"}
HEARTS = {"name": "hearts", "pattern": "heart/*", "priority": "top"}


def recipe(**render: object) -> Recipe:
    return Recipe(identity={"prompts": {"seed": 1}, "render": {"tail": "hold", "batch_size": 2, **render}})  # type: ignore[dict-item]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Five stars and one heart."""
    names = ["star/red", "star/red", "heart/red", "star/blue", "star/red", "star/red"]
    records = [replace(record(i), class_name=name, text=f"number {i}") for i, name in enumerate(names)]
    writer = CacheWriter(tmp_path / "cache", recipe(batch_size=50))
    writer.add("train", 0, records[:3])
    writer.add("train", 1, records[3:])
    return tmp_path / "cache"


def listed(cache: Path, *specs: dict[str, object], count: int = 8, **config: object) -> PicturePlan:
    classes = ClassFile.model_validate({"classes": specs})
    return plan_pictures(classes, SOURCE, 0, count, PicturesConfig.model_validate(config), cache, recipe())


def photograph(folder: Path, colour: str = "red") -> Path:
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(folder / "a.png")
    return folder


def test_what_is_not_used_or_cut_is_told(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own, file = photograph(tmp_path / "own"), tmp_path / "lines.txt"
    (own / "a.txt").write_text("zork " * 90)
    (own / ".b.txt").write_text("?")
    file.write_bytes(b"star/red\tbad \x07\nstar/red\ta star\nstar/blue\ta blue star\n")
    classes = ClassFile.model_validate({"classes": [STARS, {"name": "z", "priority": "low", "images": own}]})
    found = plan_pictures(classes, FileSource(path=file), 0, 4, PicturesConfig(reuse=0), cache, recipe())
    assert capsys.readouterr().out.splitlines() == [
        "class 'z': images: 1 hidden files left out (the first: .b.txt)",
        f"prompts: 1 with control characters, left out (the first: {file}:1 (U+0007))",
    ]
    tokenizer = CLIPTokenizer.from_pretrained("stages/tiny/model/tokenizer")
    assert found.truncation_lines(tokenizer) == [
        f"prompts: 1 longer than 24 tokens, cut there (the first: {own / 'a.png'})"
    ]


def test_records_of_the_cache_count_toward_the_quota(cache: Path) -> None:
    found = listed(cache, STARS, HEARTS)
    assert found.counts_by_source() == {
        ("stars", "reused"): 4,
        ("hearts", "reused"): 1,
        ("hearts", "painted"): 3,
    }
    assert [one.record_number for one in found.prompts if isinstance(one, CachedPrompt)] == [0, 1, 3, 4, 2]


def test_no_more_is_taken_than_is_allowed(cache: Path) -> None:
    assert listed(cache, STARS, HEARTS, reuse=0.5).counts_by_source()["stars", "reused"] == 2
    assert {source for _, source in listed(cache, STARS, HEARTS, reuse=0).counts_by_source()} == {"painted"}


def test_a_record_that_a_class_of_tags_might_own_is_not_taken(cache: Path) -> None:
    left = {"name": "left", "pattern": "star/*", "tags": {"place": "left"}, "priority": "top"}
    assert {source for _, source in listed(cache, STARS, left).counts_by_source()} == {"painted"}


def test_records_that_were_made_otherwise_are_painted_again(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classes = ClassFile.model_validate({"classes": [STARS]})
    found = plan_pictures(classes, SOURCE, 0, 2, PicturesConfig(), cache, recipe(tail="data"))
    assert found.counts_by_source() == {("stars", "painted"): 2}
    assert 'it was made otherwise: render.tail was "hold", is now "data"' in capsys.readouterr().out


def test_a_picture_is_painted_from_each_prompt_as_often_as_asked_with_seeds_of_its_own(cache: Path) -> None:
    once = listed(cache, HEARTS, count=2, reuse=0).prompts
    found = listed(cache, HEARTS, count=5, reuse=0, variants=3).prompts
    assert [prompt.text for prompt in found] == [once[0].text] * 3 + [once[1].text] * 2
    assert len({prompt.seed for prompt in found}) == 5
    assert [found[0], found[3]] == list(once)


def test_photographs_stand_beside_the_quota_and_each_source_has_keys_in_a_row(cache: Path, tmp_path: Path) -> None:
    own = {"images": photograph(tmp_path / "own"), "caption": "a heart"}
    zorks = {"name": "zorks", "priority": "top", **own, "caption": "a zork"}
    found = listed(cache, STARS, {**HEARTS, **own}, zorks)
    sources = [found.source_at(number) for number in range(len(found.prompts))]
    assert sources == ["painted"] * 3 + ["reused"] * 5 + ["photograph"] * 2
    assert Counter(found.class_of) == {"stars": 4, "hearts": 5, "zorks": 1}
    assert [prompt.text for prompt in found.prompts[-2:]] == ["a heart", "a zork"]


def test_the_recipe_tells_what_a_photograph_shows_and_not_where_it_lies(cache: Path, tmp_path: Path) -> None:
    def told(folder: Path, caption: str = "a zork") -> str:
        zorks = {"name": "zorks", "priority": "top", "images": folder, "caption": caption}
        return listed(cache, zorks).recipe.fingerprint()

    one = photograph(tmp_path / "one")
    first = told(one)
    assert told(Path(shutil.copytree(one, tmp_path / "other"))) == first
    assert told(photograph(tmp_path / "blue", "blue")) != first
    assert told(one, "a blip") != first


def test_what_is_not_asked_for_changes_no_recipe(cache: Path) -> None:
    assert listed(cache, STARS, reuse=0).recipe == recipe()
    assert listed(cache, STARS, reuse=1).recipe != recipe()


def test_a_class_without_prompts_is_refused_with_its_name(cache: Path) -> None:
    with pytest.raises(Refused, match="class 'whales': 0 of 4 prompts found"):
        listed(cache, STARS, {"name": "whales", "pattern": "animal/whale", "priority": "top"})
