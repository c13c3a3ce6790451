"""A teacher that moved, and an older cache: opened where the files are the same, refused where they are not."""

import shutil
from pathlib import Path

import pytest
import torch

from configs.load import load
from shards.manifest import Manifest, Recipe
from stages import cache_teacher
from stages.cache import targets
from stages.nets.run_folder import Origin, load_run_teacher
from stages.system.refusal import Refused
from stages.teacher_files.folder import digest_files
from stages.teacher_files.open import TeacherFolder
from stages.upkeep import find_origin

CPU = torch.device("cpu")
FEW = ["--count", "4", "--validation-count", "2", "--render.records-per-shard", "2", "--render.states.steps", "4"]
CONFIG, GRAMMAR = (Path(name).absolute() for name in ("configs/tiny.yaml", "stages/tiny/grammar.yaml"))


def cache(run: Path, teacher: str, *words: str) -> Manifest:
    config = ["--run", str(run), "--teacher", teacher, *FEW, "--prompts.grammar", str(GRAMMAR), *words]
    cache_teacher.run(load(cache_teacher.Config, "cache_teacher", [CONFIG], config))
    return Manifest.open(run / "cache")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that commands are started in, with a teacher in it."""
    shutil.copytree("stages/tiny/model", tmp_path / "home" / "models" / "tiny")
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"


def test_a_teacher_named_relative_is_opened_from_another_folder(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = cache(home / "run", "models/tiny")
    assert manifest.recipe.information["teacher_location"] == "models/tiny"
    assert manifest.recipe.information["teacher_path"] == str(home / "models/tiny")
    monkeypatch.chdir(home.parent)
    origin = Origin.from_manifest(manifest)
    assert load_run_teacher(origin, CPU, torch.float32).folder == home / "models/tiny"
    assert find_origin(home / "run" / "cache").teacher_location() == str(home / "models/tiny")
    origin.save(home / "run")
    assert Origin.open(home / "run") == origin


def test_where_it_was_named_comes_before_where_that_was(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = cache(home / "run", "models/tiny")
    moved = home.parent / "elsewhere"
    shutil.copytree(home, moved)
    monkeypatch.chdir(moved)
    assert (
        load_run_teacher(Origin.from_manifest(manifest), CPU, torch.float32).folder.absolute() == moved / "models/tiny"
    )


def test_a_teacher_that_lies_nowhere_any_more_is_refused_with_both_places_and_the_option(home: Path) -> None:
    manifest = cache(home / "run", "models/tiny")
    shutil.move(home / "models", home / "moved")
    for open_teacher in (
        lambda: load_run_teacher(Origin.from_manifest(manifest), CPU, torch.float32),
        find_origin(home / "run/cache").teacher_location,
    ):
        with pytest.raises(Refused) as refusal:
            open_teacher()
        for name in ("'models/tiny'", repr(str(home / "models/tiny")), "--teacher"):
            assert name in str(refusal.value)
    there = Origin.from_manifest(manifest, "moved/tiny")
    assert load_run_teacher(there, CPU, torch.float32).name_facts == {"teacher": "tiny"}
    assert there.teacher_path == str(home / "moved/tiny")


def test_an_older_origin_names_one_place(home: Path) -> None:
    origin = Origin("models/tiny", {}, "hold", "abc")
    origin.save(home)
    text = (home / "origin.json").read_text().replace(',\n "teacher_path": null', "")
    assert "teacher_path" not in text
    (home / "origin.json").write_text(text)
    assert Origin.open(home) == origin


def by_the_earlier_rule(_before: object, files: TeacherFolder) -> dict[str, str]:
    folder = files.folder
    counted = {".json", ".txt", ".safetensors"}
    parts = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
    return {
        part: digest_files([file for file in (folder / part).iterdir() if file.suffix in counted]) for part in parts
    }


@pytest.fixture
def old(home: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """The recipe of a cache in `home/run` that was made when every file of a part counted; one lies beside."""
    shutil.copy(home / "models/tiny/unet/config.json", home / "models/tiny/unet/other.json")
    with monkeypatch.context() as patch:
        patch.setattr(targets, "identity_as_recorded", by_the_earlier_rule)
        return cache(home / "run", "models/tiny").recipe


def test_a_older_cache_is_continued_and_its_teacher_opened(home: Path, old: Recipe) -> None:
    longer = cache(home / "run", "models/tiny", "--count", "6")
    assert sum(shard.records for shard in longer.shards_of("train")) == 6
    assert longer.recipe.fingerprint() == old.fingerprint()
    assert load_run_teacher(Origin.from_manifest(longer), CPU, torch.float32).name_facts == {"teacher": "tiny"}


def test_a_older_cache_is_not_continued_by_other_weights(home: Path, old: Recipe) -> None:
    config = home / "models/tiny/vae/config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(Refused, match=r"another recipe: teacher\.vae"):
        cache(home / "run", "models/tiny")
    with pytest.raises(Refused, match=r"vae changed since the cache was made .* --teacher"):
        load_run_teacher(Origin.from_manifest(Manifest.open(home / "run/cache")), CPU, torch.float32)
