"""What a command prints names locations; a path that is meant itself stays one."""

import sys
from pathlib import Path

import pytest

from stages.system.storage.attached import attached_locations
from stages.system.storage.locations import Location, location_of, show_locations, shown_here
from stages.teacher_files.recorded import absolute_place, recorded_sources


@pytest.fixture(autouse=True)
def _own_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOLLUNE_STORAGE", str(tmp_path / "storage"))
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    monkeypatch.delenv("SOLLUNE_ATTACHED", raising=False)


def test_lines_of_a_command_name_locations(capsys: pytest.CaptureFixture[str]) -> None:
    streams, folder = (sys.stdout, sys.stderr), Location("s3", "b/runs/a").folder
    with attached_locations():
        print(folder / "cache", "2 shards", flush=True)
        print(f"{folder}: warning", file=sys.stderr)
        print(f"everything is in {shown_here(folder)}")
    assert (sys.stdout, sys.stderr) == streams
    written = capsys.readouterr()
    assert written.out.splitlines() == [
        "s3://b/runs/a/cache 2 shards",
        f"everything is in {folder.parents[3]}/./s3/b/runs/a",
    ]
    assert written.err == "s3://b/runs/a: warning\n"


@pytest.mark.parametrize("key", ["b/x", "b/a b/ä"])
def test_a_path_that_is_meant_itself_leads_to_the_same_file(key: str) -> None:
    folder = Location("gs", key).folder
    shown = show_locations(shown_here(folder))
    assert Path(shown) == folder
    assert location_of(Path(shown)) == Location("gs", key)
    assert shown_here(Path("/elsewhere/x")) == "/elsewhere/x"


def test_a_teacher_in_a_bucket_is_recorded_by_its_location(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.system.storage.attached.attach", lambda _location: None)
    teacher = Location("s3", "b/teacher")
    teacher.folder.mkdir(parents=True)
    place = absolute_place(str(teacher.folder))
    assert place == "s3://b/teacher"
    monkeypatch.setenv("SOLLUNE_STORAGE", str(tmp_path / "another machine"))
    sources = recorded_sources(place, place, {"location": place})
    assert [source.location for source in sources] == [str(teacher.folder)]
    assert str(teacher.folder).startswith(str(tmp_path / "another machine"))
