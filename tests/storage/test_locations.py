"""What a location is, and where its working folder lies."""

from pathlib import Path

import pytest

from stages.system.storage.locations import (
    Location,
    location_of,
    locations_in,
    map_locations,
    parse_location,
    show_locations,
)


@pytest.fixture(autouse=True)
def _own_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOLLUNE_STORAGE", str(tmp_path / "storage"))
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://b/runs/a", "s3://b/runs/a"),
        ("S3://b/runs/a/", "s3://b/runs/a"),
        ("s3a://b/runs///", "s3://b/runs"),
        ("gcs://b/a b/ä", "gs://b/a b/ä"),
        ("hf://datasets/org/name", "hf://datasets/org/name"),
    ],
)
def test_a_location_has_one_form_and_its_folder_leads_back_to_it(text: str, shown: str) -> None:
    place = parse_location(text)
    assert isinstance(place, Location)
    assert str(place) == shown
    assert location_of(place.folder) == place
    assert location_of(place.folder / "cache") == place / "cache"
    assert show_locations(f"{place.folder}/x: missing") == f"{shown}/x: missing"


@pytest.mark.parametrize("text", ["runs/a", "/runs/a", "a:b", "C:/x", "https", "it is 5:30", "~/x", ""])
def test_a_path_of_this_machine_is_no_location(text: str) -> None:
    assert parse_location(text) is None
    assert map_locations(text) == text
    assert location_of(Path(text or ".")) is None


@pytest.mark.parametrize("text", ["file:///data/x", "file://localhost/data/x", "FILE:///data/x"])
def test_a_file_location_is_the_local_path(text: str) -> None:
    assert parse_location(text) == Path("/data/x")
    assert map_locations(text) == "/data/x"
    assert locations_in(map_locations(text)) == []


@pytest.mark.parametrize(
    "text",
    [
        "s3:/typo", "s3:typo", "file:x", "file://x/y", "s3://", "s3://b", "s3://b/", "gs://b//", "s3://b//a", "s3:///a/b",
        "s3://b/../a", "s3://b/./a", "ftp://host/x", "http://host/x", f"s3://b/{'ä' * 128}", "s3://b/a\nb",
    ],
)  # fmt: skip
def test_what_begins_like_a_location_and_names_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=" - "):
        parse_location(text)


def test_folders_keep_their_relations() -> None:
    run = Location("s3", "b/runs/a")
    assert (run / "distill").folder.parent == run.folder
    assert run.holds(run / "distill")
    assert not run.holds(Location("s3", "b/runs/ab"))


def test_another_address_has_other_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Location("s3", "b/a")
    usual = place.folder
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://localhost:1")
    assert place.folder != usual
    assert location_of(place.folder) == place
    assert location_of(usual) is None


def test_every_text_of_a_configuration_is_shown_as_its_location() -> None:
    folder = Location("s3", "b/a").folder
    assert show_locations({"run": str(folder), "list": [f"{folder}/x", 3]}) == {
        "run": "s3://b/a",
        "list": ["s3://b/a/x", 3],
    }


def test_a_configuration_leads_to_each_location_once_and_the_outer_one_first() -> None:
    values = {
        "run": "s3://b/run",
        "list": ["gs://c/x", {"deep": ("s3://b/run/cache", "s3://b/run")}],
        "other": "/tmp/x",
    }
    mapped = map_locations(values)
    assert [str(place) for place in locations_in(mapped)] == ["gs://c/x", "s3://b/run", "s3://b/run/cache"]
    assert locations_in({"text": "a star", "number": 3, "path": Path("relative")}) == []
    assert show_locations(mapped)["run"] == "s3://b/run"


def link_to(place: Path, target: Path) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(target)
    return place


def test_a_link_is_of_the_location_that_it_leads_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, other = Location("s3", "b/run"), Location("gs", "c/study")
    (run.folder / "cache").mkdir(parents=True)
    for place in (tmp_path / "out/0/cache", other.folder / "0/cache"):
        assert location_of(link_to(place, run.folder / "cache")) == run / "cache"
        assert location_of(place / "data/train-000000.tar") == run / "cache/data/train-000000.tar"
    assert location_of(other.folder / "0") == other / "0"
    twice = link_to(tmp_path / "twice", tmp_path / "out/0")
    assert location_of(twice / "cache/x") == run / "cache/x"
    monkeypatch.chdir(tmp_path)
    assert location_of(Path("twice/cache")) == run / "cache"
    assert locations_in({"run": str(twice / "cache"), "out": str(tmp_path / "out")}) == [run / "cache"]


def test_a_working_folder_on_another_disk_keeps_its_name(tmp_path: Path) -> None:
    run = Location("s3", "b/run")
    (tmp_path / "disk/run").mkdir(parents=True)
    link_to(run.folder.parent, tmp_path / "disk")
    assert location_of(run.folder / "cache") == run / "cache"
    assert location_of(tmp_path / "disk/run") is None


def test_a_text_that_can_be_no_path_is_no_location(tmp_path: Path) -> None:
    loop = link_to(tmp_path / "loop", tmp_path / "loop")
    assert locations_in(["/a\0b", "/" + "x" * 5000, "/" + "x/" * 3000, "/\ud800", str(loop / "x")]) == []
