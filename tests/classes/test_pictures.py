"""Laws of the plan of pictures: which are reused, generated or photographs, and what the recipe records."""

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
from stages.classes.pictures import CachedPrompt, PicturePlan, PicturesConfig, plan_pictures
from stages.classes.specification import ClassFile
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


def plan(cache: Path, *specs: dict[str, object], count: int = 8, **config: object) -> PicturePlan:
    classes = ClassFile.model_validate({"classes": specs})
    return plan_pictures(classes, SOURCE, 0, count, PicturesConfig.model_validate(config), cache, recipe())


def photograph(folder: Path, colour: str = "red") -> Path:
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(folder / "a.png")
    return folder


def test_omitted_and_truncated_texts_are_reported(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, file = photograph(tmp_path / "own"), tmp_path / "lines.txt"
    (own / "a.txt").write_text("zork " * 90)
    (own / ".b.txt").write_text("?")
    file.write_bytes(b"star/red\tbad \x07\nstar/red\ta star\nstar/blue\ta blue star\n")
    classes = ClassFile.model_validate({"classes": [STARS, {"name": "z", "priority": "low", "images": own}]})
    pictures = plan_pictures(classes, FileSource(path=file), 0, 4, PicturesConfig(reuse=0), cache, recipe())
    assert capsys.readouterr().out.splitlines() == [
        "class 'z': images: 1 hidden files left out (the first: .b.txt)",
        f"prompts: 1 with control characters, left out (the first: {file}:1 (U+0007))",
    ]
    tokenizer = CLIPTokenizer.from_pretrained("stages/tiny/model/tokenizer")
    assert pictures.truncation_lines(tokenizer) == [
        f"prompts: 1 longer than 24 tokens, cut there (the first: {own / 'a.png'})"
    ]


def test_records_of_the_cache_count_toward_the_quota(cache: Path) -> None:
    pictures = plan(cache, STARS, HEARTS)
    assert pictures.counts_by_source() == {
        ("stars", "reused"): 4,
        ("hearts", "reused"): 1,
        ("hearts", "painted"): 3,
    }
    assert [one.record_number for one in pictures.prompts if isinstance(one, CachedPrompt)] == [0, 1, 3, 4, 2]


def test_no_more_is_reused_than_allowed(cache: Path) -> None:
    assert plan(cache, STARS, HEARTS, reuse=0.5).counts_by_source()["stars", "reused"] == 2
    assert {source for _, source in plan(cache, STARS, HEARTS, reuse=0).counts_by_source()} == {"painted"}


def test_a_record_that_a_class_with_tags_might_own_is_not_reused(cache: Path) -> None:
    left = {"name": "left", "pattern": "star/*", "tags": {"place": "left"}, "priority": "top"}
    assert {source for _, source in plan(cache, STARS, left).counts_by_source()} == {"painted"}


def test_records_of_another_recipe_are_generated_again(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classes = ClassFile.model_validate({"classes": [STARS]})
    pictures = plan_pictures(classes, SOURCE, 0, 2, PicturesConfig(), cache, recipe(tail="data"))
    assert pictures.counts_by_source() == {("stars", "painted"): 2}
    assert 'it was made otherwise: render.tail was "hold", is now "data"' in capsys.readouterr().out


def test_each_prompt_gives_its_number_of_variants_with_seeds_of_their_own(cache: Path) -> None:
    once = plan(cache, HEARTS, count=2, reuse=0).prompts
    pictures = plan(cache, HEARTS, count=5, reuse=0, variants=3).prompts
    assert [prompt.text for prompt in pictures] == [once[0].text] * 3 + [once[1].text] * 2
    assert len({prompt.seed for prompt in pictures}) == 5
    assert [pictures[0], pictures[3]] == list(once)


def test_photographs_do_not_count_toward_the_quota_and_each_source_has_consecutive_keys(
    cache: Path, tmp_path: Path
) -> None:
    own = {"images": photograph(tmp_path / "own"), "caption": "a heart"}
    zorks = {"name": "zorks", "priority": "top", **own, "caption": "a zork"}
    pictures = plan(cache, STARS, {**HEARTS, **own}, zorks)
    sources = [pictures.source_at(number) for number in range(len(pictures.prompts))]
    assert sources == ["painted"] * 3 + ["reused"] * 5 + ["photograph"] * 2
    assert Counter(pictures.class_of) == {"stars": 4, "hearts": 5, "zorks": 1}
    assert [prompt.text for prompt in pictures.prompts[-2:]] == ["a heart", "a zork"]


def test_the_recipe_records_the_content_of_a_photograph_and_not_its_path(cache: Path, tmp_path: Path) -> None:
    def fingerprint(folder: Path, caption: str = "a zork") -> str:
        zorks = {"name": "zorks", "priority": "top", "images": folder, "caption": caption}
        return plan(cache, zorks).recipe.fingerprint()

    one = photograph(tmp_path / "one")
    first = fingerprint(one)
    assert fingerprint(Path(shutil.copytree(one, tmp_path / "other"))) == first
    assert fingerprint(photograph(tmp_path / "blue", "blue")) != first
    assert fingerprint(one, "a blip") != first


def test_unused_settings_change_no_recipe(cache: Path) -> None:
    assert plan(cache, STARS, reuse=0).recipe == recipe()
    assert plan(cache, STARS, reuse=1).recipe != recipe()


def test_a_class_without_prompts_is_refused_with_its_name(cache: Path) -> None:
    with pytest.raises(Refused, match="class 'whales': 0 of 4 prompts found"):
        plan(cache, STARS, {"name": "whales", "pattern": "animal/whale", "priority": "top"})
