"""Repair restores the very bytes, and re-makes nothing that was whole."""

from pathlib import Path

import pytest

from configs.load import load
from stages import cache_teacher, upkeep

FEW = ["--count", "6", "--validation-count", "2", "--render.records-per-shard", "2", "--render.states.steps", "4"]


def content(run: Path) -> dict[str, bytes]:
    """Every file of the cache with its bytes, but for what was moved aside."""
    files = [path for path in (run / "cache").rglob("*") if path.is_file()]
    return {str(path.relative_to(run)): path.read_bytes() for path in files if "quarantine" not in path.parts}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "small"
    config = load(cache_teacher.Config, "cache_teacher", [Path("configs/tiny.yaml")], ["--run", str(folder), *FEW])
    cache_teacher.run(config)
    return folder


@pytest.mark.parametrize(
    "damaged",
    [
        ("data/train-000001.tar",),
        ("table.zarr/s/zarr.json", "table.zarr/s/c/0"),
        ("manifest.json",),
        ("journal/train-000000.json",),
        ("journal/train-000001.json", "data/train-000001.tar"),
        ("journal/train-000002.json", "manifest.json"),
    ],
)
def test_repair_restores_the_same_bytes_and_touches_nothing_else(run: Path, damaged: tuple[str, ...]) -> None:
    whole, bad = content(run), {}
    for file in damaged:
        path = run / "cache" / file
        bad[file] = path.read_bytes()[:-7] + b"damaged"
        path.write_bytes(bad[file])
    lost = {Path(file).stem for file in damaged}
    lost = {name for name in lost if f"data/{name}.tar" in damaged or "manifest.json" in damaged}
    others = {path: path.stat().st_mtime_ns for path in (run / "cache/data").iterdir() if path.stem not in lost}
    assert upkeep.main(["verify", str(run)]) == 1
    assert upkeep.main(["repair", str(run)]) == 0
    assert content(run) == whole
    assert {path: path.stat().st_mtime_ns for path in others} == others
    aside = [path.read_bytes() for path in (run / "cache/quarantine").rglob("*") if path.is_file()]
    assert all(spoilt in aside for spoilt in bad.values())


def test_repair_makes_a_lost_manifest_again_and_the_shard_that_is_lost_with_it(run: Path) -> None:
    whole = content(run)
    for file in ("manifest.json", "data/train-000001.tar", "journal/train-000000.json"):
        (run / "cache" / file).unlink()
    assert upkeep.main(["repair", str(run)]) == 0
    assert content(run) == whole
