"""Locations in object stores that cannot be used, through the real commands: refused in one line, before anything."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "storage"))

CACHE = ["cache-teacher", "--config", "configs/tiny.yaml", "--count", "2", "--run"]


@pytest.mark.parametrize(
    ("location", "named"),
    [
        ("s3:/typo", ("s3:/typo", "s3://")),
        ("s3:typo/run", ("s3:typo/run", "s3://BUCKET/FOLDER")),
        ("s3://bucket", ("names no folder in a bucket", "s3://bucket/FOLDER")),
        ("s3://bucket//", ("names no folder in a bucket",)),
        ("gs://", ("gs:", "BUCKET/FOLDER")),
        ("s3://bucket/../run", (".. in it",)),
        ("ftp://host/run", ("ftp", "no storage that is known here")),
        ("S4://bucket/run", ("no storage that is known here",)),
        ("file://run", ("names no absolute path",)),
    ],
)
@pytest.mark.parametrize("command", [CACHE, ["distill", "--run"], ["shards", "verify"], ["report"]])
def test_what_names_no_location_is_refused(
    refused: Callable[..., str], command: list[str], location: str, named: tuple[str, ...]
) -> None:
    refused([*command, location], *named if "typo/" not in location or command[0] in ("shards", "report") else ())


def test_a_location_of_another_kind_in_a_file_is_named_with_its_key(
    refused: Callable[..., str], tmp_path: Path
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("distill:\n  run: ftp://host/run\n")
    refused(["distill", "--config", str(file)], "run.yaml", "distill.run", "no storage that is known here")


def test_a_file_location_is_a_folder_of_this_machine(refused: Callable[..., str], tmp_path: Path) -> None:
    refused(["shards", "verify", f"file://{tmp_path}/none"], f"{tmp_path}/none/manifest.json: not there")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    pytest.importorskip("moto", reason="moto[server] is not installed")
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    from s3_server import s3_server

    with s3_server() as address:
        yield address


@pytest.fixture
def store(address: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> str:
    """The environment of a user with a bucket."""
    for name, value in {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        "SOLLUNE_STORAGE": str(tmp_path_factory.mktemp("storage")),
    }.items():
        monkeypatch.setenv(name, value)
    from stages.system.storage.locations import Location
    from stages.system.storage.object_store import store_of

    store_of(Location("s3", "here/x"))._files.makedirs("here", exist_ok=True)
    return "here"


@pytest.mark.parametrize("command", [[*CACHE], ["distill", "--run"], ["shards", "stats"]])
def test_a_bucket_that_is_not_there_is_named(refused: Callable[..., str], store: str, command: list[str]) -> None:
    refused([*command, "s3://nowhere/run"], "s3://nowhere/run: there is no bucket nowhere")


@pytest.mark.parametrize("folder", ["empty", "empty/", "with space/ü", "with space/ü///"])
def test_a_folder_without_a_cache_is_named_by_its_location(
    refused: Callable[..., str], store: str, folder: str
) -> None:
    refused(["shards", "verify", f"s3://{store}/{folder}"], f"s3://{store}/{folder.rstrip('/')}/manifest.json")


def test_no_credentials_are_one_line(
    refused: Callable[..., str], store: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from stages.system.storage.object_store import _store

    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    _store.cache_clear()
    try:
        refused(["shards", "verify", f"s3://{store}/run"], f"s3://{store}/run: no credentials", "AWS_ACCESS_KEY_ID")
    finally:
        _store.cache_clear()


def test_nothing_of_a_store_is_imported_for_local_paths(tmp_path: Path) -> None:
    import subprocess

    code = (
        "import sys; from stages import __main__ as cli; "
        f"cli.main(['shards', 'verify', '{tmp_path}']); cli.main(['distill', '--run', '{tmp_path}']); "
        "print([name for name in ('s3fs', 'aiobotocore', 'obstore', 'moto', 'gcsfs') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
