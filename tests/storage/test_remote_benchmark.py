"""The remote reading of `benchmarks.loader`, by our own reader, at miniature size."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.loader import make_cache, measure_loader, remote_line
from benchmarks.loader_peers import LOADERS
from benchmarks.loader_remote import (
    REMOTE_LOADERS,
    RemoteOurs,
    copy_of,
    forget_copy,
    remote_environment,
    s3_server,
    upload,
)

RECORDS, SHARD, BATCHES = 16, 4, 2


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, str]]]:
    """A folder with a cache that the benchmark's https server has too, and the environment that names the server."""
    folder = tmp_path_factory.mktemp("remote-loader")
    make_cache(folder / "cache", RECORDS, SHARD)
    with s3_server(folder, tls=True) as server, pytest.MonkeyPatch.context() as patch:
        environment = remote_environment(server, folder)
        for name, value in environment.items():
            patch.setenv(name, value)
        upload({"cache": folder / "cache"})
        yield folder, environment


@pytest.fixture
def folder(served: tuple[Path, dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("AWS_PROFILE", "FSSPEC_S3_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    for name, value in served[1].items():
        monkeypatch.setenv(name, value)
    return served[0]


def copies(folder: Path) -> dict[str, bytes]:
    """Name -> content of each shard that was fetched."""
    return {path.name: path.read_bytes() for path in copy_of(folder / "sollune").rglob("*.tar")}


def test_the_first_epoch_fetches_every_shard_and_the_second_none(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stale = copy_of(folder / "sollune") / "stale.tar"
    stale.parent.mkdir(exist_ok=True)
    stale.touch()
    kind, copies_at_opening = type(REMOTE_LOADERS["sollune"]), []
    opened = kind.open

    def open_counted(self: RemoteOurs, *words: Any) -> Any:
        copies_at_opening.append(len(copies(folder)))
        return opened(self, *words)

    monkeypatch.setattr(kind, "open", open_counted)
    result = measure_loader("sollune", folder / "cache", folder / "sollune", 0, "remote")
    assert copies(folder) == {path.name: path.read_bytes() for path in (folder / "cache").rglob("*.tar")}
    assert copies_at_opening == [0, RECORDS // SHARD]
    assert all(result[time][rate] > 0 for time in ("first", "second") for rate in ("records", "whole", "first"))
    assert remote_line("sollune", {"sollune": [result]}).split(" | ")[3:5] == ["1 (1 to 1)"] * 2


def test_batches_from_the_server_are_those_of_the_files(folder: Path) -> None:
    forget_copy(folder / "sollune")
    read = []
    for loaders in (REMOTE_LOADERS, LOADERS):
        loader = loaders["sollune"]
        read.append([*loader.batches(loader.open(folder / "cache", folder / "sollune", 0))])
    remote, local = read
    assert len(remote) == len(local) == BATCHES
    for (keys, tensors), (local_keys, local_tensors) in zip(remote, local, strict=True):
        assert keys == local_keys
        assert tensors.keys() == local_tensors.keys()
        assert all(values.equal(local_tensors[name]) for name, values in tensors.items())


def test_a_loader_that_is_not_installed_is_named_in_its_row() -> None:
    rounds = {"sollune": [{}], "litdata": [{"failed": "not installed"}]}
    assert remote_line("litdata", rounds) == "| litdata | not installed | | | | |"
