"""Windows and landings that cannot be: refused in one line that names them, with nothing changed on the disk."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from shards.manifest import Manifest
from shards.writer import CacheWriter
from stages.__main__ import main
from tests.cli.test_broken_sized_caches import in_manifest
from tests.shards.conftest import fill_landed_cache, make_numbered_record, make_small_recipe, with_landings

GOLDEN = Path("tests/golden")
Break = Callable[[Path], object]

COMMANDS: dict[str, list[str]] = {
    "cache-teacher": ["cache-teacher", "--config", "configs/tiny.yaml", "--run", "RUN"],
    "convert": ["convert", "stages/tiny/model", "--config", "configs/tiny.yaml", "--base", "RUN", "--out", "RUN/2"],
    "doctor": ["doctor", "stages/tiny/model", "--run", "RUN"],
}
WINDOWS = ["3", "-1", "16", "true", "4.5", "four", "some", "[4, 2]", "4,2", "1e9"]


@pytest.mark.parametrize("value", WINDOWS)
@pytest.mark.parametrize("command", COMMANDS)
def test_another_number_of_windows_is_refused(command: str, value: str, tmp_path: Path, refused) -> None:
    words = [word.replace("RUN", str(tmp_path)) for word in COMMANDS[command]]
    refused([*words, f"--render.states.windows={value}"], "windows", value, "8")


@pytest.mark.parametrize("value", ["true", "3", "'4 2'", "{n: 4}"])
def test_another_number_of_windows_in_a_file_is_refused_with_the_file(value: str, tmp_path: Path, refused) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"cache_teacher: {{render: {{states: {{windows: {value}}}}}}}\n")
    words = ["cache-teacher", "--config", "configs/tiny.yaml", str(file), "--run", str(tmp_path / "run")]
    refused(words, str(file), "render.states.windows", "8")


@pytest.mark.parametrize("windows", ["1", "4", "8"])
def test_pictures_of_classes_take_no_landings(windows: str, tmp_path: Path, refused) -> None:
    words = ["--config", "configs/tiny.yaml", "--run", str(tmp_path), "--render.states.windows", windows]
    refused(["finetune-classes", *words], f"render.states.windows = {windows}", "leave it 0")


FEW = ["--count", "8", "--validation-count", "2", "--render.records-per-shard", "4", "--render.states.steps", "4"]
CACHES: dict[str, tuple[Path, list[str], list[str]]] = {
    "of schema 1": (
        GOLDEN / "data" / "cache",
        [*FEW, "--render.states.windows", "4"],
        ["render.states.windows is 4", "made with 0", "--render.states.windows 0", "RUN="],
    ),
    "of schema 1, other windows": (
        GOLDEN / "data" / "cache",
        [*FEW, "--render.states.windows", "8"],
        ["render.states.windows is 8", "made with 0", "--render.states.windows 0"],
    ),
    "of other steps too": (
        GOLDEN / "data" / "cache",
        ["--count", "8", "--validation-count", "2", "--render.records-per-shard", "4"],
        [
            "made by another recipe",
            "render.states.steps was 4, is now 25",
        ],
    ),
}


@pytest.mark.parametrize("name", CACHES)
def test_an_older_cache_is_not_continued_with_landings(name: str, tmp_path: Path, refused) -> None:
    cache, words, named = CACHES[name]
    shutil.copytree(cache, tmp_path / "cache")
    start = ["cache-teacher", "--config", "configs/tiny.yaml", "--teacher", str(GOLDEN / "data" / "teacher")]
    refused([*start, "--run", str(tmp_path), *words], str(tmp_path / "cache"), *named)


def fewer_landings(cache: Path) -> None:
    """A second shard whose records have two landings instead of four."""
    shutil.rmtree(cache)
    writer = CacheWriter(cache, make_small_recipe().in_schema(3))
    writer.add("train", 0, [with_landings(make_numbered_record(0))])
    writer.add("train", 1, [with_landings(make_numbered_record(1), (1.0, 0.5))])


BROKEN: dict[str, tuple[Break, list[str]]] = {
    "landings in a cache that has none": (
        in_manifest('"schema_version": 3', '"schema_version": 2'),
        ["train-000000.tar", "has 4 landings, in a cache of schema 2", "repair"],
    ),
    "a schema of none": (in_manifest('"schema_version": 3', '"schema_version": 1'), ["in schema 1", "repair"]),
    "a schema to come": (in_manifest('"schema_version": 3', '"schema_version": 4'), ["reads 1, 2 and 3"]),
    "fewer landings": (fewer_landings, ["train-000001.tar", "landing_s", "unlike the records before it"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_cache_of_contradicting_landings_is_refused(name: str, tmp_path: Path, refused) -> None:
    broken, named = BROKEN[name]
    cache = fill_landed_cache(tmp_path / "cache")
    broken(cache)
    refused(["shards", "stats", str(cache)], *named)


def test_landings_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = fill_landed_cache(tmp_path / "cache")
    assert main(["shards", "show", str(cache), "--no-picture"]) == 0
    printed = capsys.readouterr().out
    assert "landing 1       s 0.750000" in printed
    assert "landing_x       [4, 3, 4, 5]" in printed
    assert Manifest.open(cache).schema_version == 3
