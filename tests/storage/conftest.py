"""A bucket of an S3 server on loopback, reached through a proxy that can fail; skipped by name without the packages."""

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

pytest.importorskip("moto", reason="moto[server] is not installed")
pytest.importorskip("s3fs", reason="s3fs is not installed")

from s3_server import FaultyProxy, faulty_proxy, s3_server

NUMBERS = itertools.count()


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    with s3_server() as address:
        yield address


@pytest.fixture
def proxy(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """A proxy without faults yet; the environment names it, with credentials and working folders of this test."""
    for name in ("AWS_PROFILE", "FSSPEC_S3_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "SOLLUNE_ATTACHED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("SOLLUNE_STORAGE", str(tmp_path / "storage"))
    monkeypatch.setattr("stages.system.storage.mirror.POLL_SECONDS", 0.2)
    with faulty_proxy(server, 0.0) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
        yield proxy


@pytest.fixture
def bucket(proxy: FaultyProxy) -> str:
    """A new bucket's name."""
    from stages.system.storage.locations import Location
    from stages.system.storage.object_store import store_of

    name = f"bucket-{next(NUMBERS)}"
    store_of(Location("s3", f"{name}/x"))._files.mkdir(name)
    return name


@pytest.fixture(params=["s3fs", "obstore"])
def fetched_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The library that fetches whole objects; asked for before the first store of a test."""
    from stages.system.storage import object_store
    from stages.system.storage.obstore_reader import ObstoreReader

    name: str = request.param
    if name == "obstore":
        pytest.importorskip("obstore", reason="obstore is not installed")
    else:
        monkeypatch.setattr(ObstoreReader, "of", lambda _files: None)
    object_store._store.cache_clear()
    yield name
    object_store._store.cache_clear()
