"""A cache and a run wholly in a bucket, with failing requests and a machine that is lost: the bits of local files."""

import hashlib
import os
import signal
from pathlib import Path

import pytest
from s3_server import FaultyProxy

from shards.manifest import Manifest
from stages import __main__ as cli
from stages.system.storage.locations import Location
from stages.system.storage.object_store import store_of
from stages.train.checkpoint_store import CheckpointStore

TINY = ["--config", "configs/tiny.yaml"]
CACHE = ["--count", "8", "--validation-count", "2", "--render.records-per-shard", "4", "--render.states.steps", "4"]
TRAIN = ["--train.max-samples", "24", "--train.checkpoint-every-samples", "8", "--train.batch-size", "4"]
TRAIN += ["--david.fusion.formula", "static", "--validation.states", "6", "--grid.sampler.steps", "2"]
LAST = "distill/checkpoints/000000024"
WEIGHTS = ("student.safetensors", "ema.safetensors", "optimizer.pt")


@pytest.mark.skipif(not Path("stages/tiny/model").is_dir(), reason="the embedded teacher is not here")
def test_a_run_in_a_bucket_has_the_bits_of_a_local_one(
    bucket: str, proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local, remote = tmp_path / "run", Location("s3", f"{bucket}/runs/tiny \u00e4")
    assert cli.main(["cache-teacher", *TINY, *CACHE, "--run", str(local)]) == 0
    assert cli.main(["distill", *TINY, *TRAIN, "--run", str(local)]) == 0

    proxy.share = 0.05
    assert cli.main(["cache-teacher", *TINY, *CACHE, "--run", str(remote)]) == 0
    monkeypatch.setenv("SOLLUNE_STORAGE", str(tmp_path / "second machine"))
    with monkeypatch.context() as patch:
        _interrupt_after(patch, 8)
        with pytest.raises(SystemExit) as left:
            cli.main(["distill", *TINY, *TRAIN, "--run", str(remote)])
        assert left.value.code == 128 + signal.SIGTERM
    assert store_of(remote).info(remote / LAST / "state.json") is None
    monkeypatch.setenv("SOLLUNE_STORAGE", str(tmp_path / "third machine"))
    assert cli.main(["distill", *TINY, *TRAIN, "--run", f"{remote}/"]) == 0

    assert Manifest.open(remote.folder / "cache").shards == Manifest.open(local / "cache").shards
    assert proxy.faults.total() > 5
    proxy.share = 0.0
    for name in WEIGHTS:
        stored = store_of(remote).read(remote / LAST / name)
        assert stored is not None
        assert _sha256(stored) == _sha256((local / LAST / name).read_bytes()), name
    names = set(store_of(remote).find(remote))
    assert {"distill/COMPLETE", "distill/export/diffusers/model_index.json", "cache/COMPLETE"} <= names
    assert not any("/." in f"/{name}" for name in names), "claims and partial files are gone"
    assert f"run: {remote}" in (store_of(remote).read(remote / "distill/config.yaml") or b"").decode()


def _interrupt_after(patch: pytest.MonkeyPatch, samples: int) -> None:
    publish = CheckpointStore.publish

    def interrupt(store: CheckpointStore, partial: Path) -> Path:
        final = publish(store, partial)
        if int(final.name) == samples:
            os.kill(os.getpid(), signal.SIGTERM)
        return final

    patch.setattr(CheckpointStore, "publish", interrupt)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
