"""A damaged shard in a bucket is named, made again there by `shards repair`, and whole for every other machine."""

from pathlib import Path

import pytest
from s3_server import FaultyProxy

from shards.manifest import Manifest
from stages import __main__ as cli
from stages.system.storage.locations import Location
from stages.system.storage.object_store import store_of

CACHE = ["cache-teacher", "--config", "configs/tiny.yaml", "--count", "4", "--validation-count", "1"]
CACHE += ["--render.records-per-shard", "2", "--render.states.steps", "4"]


@pytest.mark.skipif(not Path("stages/tiny/model").is_dir(), reason="the embedded teacher is not here")
def test_a_damaged_shard_is_made_again_in_the_bucket(
    bucket: str, proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Location("s3", f"{bucket}/run")
    assert cli.main([*CACHE, "--run", str(run)]) == 0
    shard = Manifest.open(run.folder / "cache").shards_of("train")[1]
    object_ = run / "cache" / shard.file
    whole = store_of(run).read(object_)
    assert whole is not None
    damaged = bytearray(whole)
    damaged[3000] ^= 1
    store_of(run).put_whole(object_, bytes(damaged))
    monkeypatch.setenv("SOLLUNE_STORAGE", str(tmp_path / "second machine"))
    assert cli.main(["shards", "verify", str(run)]) == 1
    assert f"sollune shards repair {run}/cache makes it again" in capsys.readouterr().err
    assert cli.main(["shards", "repair", str(run)]) == 0
    assert str(tmp_path) not in capsys.readouterr().out
    assert store_of(run).read(object_) == whole
    assert store_of(run).read(run / "cache/quarantine/0000" / shard.file) == bytes(damaged)
    monkeypatch.setenv("SOLLUNE_STORAGE", str(tmp_path / "third machine"))
    assert cli.main(["shards", "verify", str(run)]) == 0
