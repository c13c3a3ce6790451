"""How fast a remote cache is read: `python benchmarks/storage.py OUT` writes a cache of noise and OUT/storage.json.

An S3 server (moto's, a process of its own on loopback) holds the cache; a proxy before it gives each answer the time of
a link of `--mebibytes-per-second`. Measured are the first epoch (shards fetched while others are read and worked on),
the second one from the local copy against the files themselves in turns, and whole shards by s3fs and by obstore.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "storage")]

from s3_server import FaultyProxy, faulty_proxy, s3_server  # noqa: E402

from configs.values import PictureSize  # noqa: E402
from shards.manifest import Manifest, Recipe  # noqa: E402
from shards.reader import Reader  # noqa: E402
from shards.record import BlockFeatures, Record, States  # noqa: E402
from shards.writer import CacheWriter  # noqa: E402
from stages.system.storage.locations import Location  # noqa: E402
from stages.system.storage.mirror import Mirror  # noqa: E402
from stages.system.storage.object_store import store_of  # noqa: E402

STATES, SIDE, BATCH, ROUNDS = 4, 32, 16, 5


def record(number: int) -> Record:
    """A record of noise, of a quarter of SD1.5's latents."""
    generator = torch.Generator().manual_seed(number)

    def half(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).half()

    return Record(
        key=f"{number:09d}",
        text=f"number {number}",
        class_name="noise",
        seed=number,
        guidance_scale=5.0,
        cond=half(77, 768),
        x0=half(4, SIDE, SIDE),
        states=States(
            k=torch.randint(0, 1000, (STATES,), generator=generator),
            s=torch.rand(STATES, generator=generator),
            x_s=half(STATES, 4, SIDE, SIDE),
            v_cond=half(STATES, 4, SIDE, SIDE),
            v_uncond=half(STATES, 4, SIDE, SIDE),
            trajectory=torch.arange(STATES) == 0,
        ),
        features=BlockFeatures({"mid": half(STATES, 1280)}),
        size=PictureSize(8 * SIDE, 8 * SIDE),
    )


def make_cache(folder: Path, shards: int, records: int) -> None:
    """A cache of so many training shards."""
    writer = CacheWriter(folder, Recipe(identity={"noise": records}, information={}))
    for index in range(shards):
        writer.add("train", index, map(record, range(index * records, (index + 1) * records)))


def epoch(cache: Path, seconds_of_work: float = 0.0, workers: int = 0) -> dict[str, float]:
    """Read one epoch in batches, with so much other work after each; how long it took, and how long it waited."""
    reader = Reader(cache, batch_size=BATCH, memory_budget_bytes=0, workers=workers)
    batches, waited, first, start = reader.batches(), 0.0, 0.0, time.perf_counter()
    count = reader.samples_per_epoch // BATCH
    for number in range(count):
        before = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - before
        first = first if number else waited
        time.sleep(seconds_of_work)
    seconds = time.perf_counter() - start
    batches.close()  # type: ignore[attr-defined]
    return {"seconds": seconds, "waited": waited, "first batch": first, "batches": count}


def second_epoch(local: Path, remote: Path) -> dict[str, Any]:
    """The copy against the files, in turns; the share is of the medians."""
    seconds: dict[str, list[float]] = {"files": [], "copy": []}
    epoch(local)
    epoch(remote)
    for number in range(ROUNDS):
        pair = [("files", local), ("copy", remote)]
        for name, cache in pair if number % 2 else pair[::-1]:
            seconds[name].append(epoch(cache)["seconds"])
    return {**seconds, "speed of files": statistics.median(seconds["files"]) / statistics.median(seconds["copy"])}


def first_epoch(remote: Location, proxy: FaultyProxy, seconds_of_work: float) -> dict[str, Any]:
    """An epoch on a machine without a copy; a loop that fetches first and works then takes fetching and work."""
    stored = store_of(remote)
    shards = Manifest.open(remote.folder).shards
    scratch = remote.folder / ".fetched"
    before = time.perf_counter()
    for shard in shards:
        stored.get_whole(remote / shard.file, scratch)
    fetching = time.perf_counter() - before
    scratch.unlink()
    for tar in (remote.folder / "data").glob("*.tar"):
        tar.unlink()
    result = epoch(remote.folder, seconds_of_work, workers=1)
    work = seconds_of_work * result["batches"]
    alone = fetching + work
    return {**result, "work": work, "fetching alone, one by one": fetching, "share of one after the other":
            result["seconds"] / alone, "bytes": proxy.bytes_sent}  # fmt: skip


def libraries(remote: Location, folder: Path) -> dict[str, Any]:
    """Whole shards a second through the same door, by s3fs alone and with obstore before it, in turns."""
    store = store_of(remote)
    reader = store._reader
    if reader is None:
        return {"obstore": "not installed, or its settings are not those of s3fs"}
    shards, target = Manifest.open(remote.folder).shards, folder / "fetched"
    rates: dict[str, list[float]] = {"s3fs": [], "obstore": []}
    for _ in range(ROUNDS):
        for name in rates:
            store._reader = reader if name == "obstore" else None
            start = time.perf_counter()
            for shard in shards:
                store.get_whole(remote / shard.file, target)
            rates[name].append(sum(shard.bytes for shard in shards) / 2**20 / (time.perf_counter() - start))
    store._reader = reader
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {**rates, "obstore over s3fs": medians["obstore"] / medians["s3fs"]}


def main() -> None:
    """Measure, print and write it all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shards", type=int, default=48)
    parser.add_argument("--records", type=int, default=16)
    parser.add_argument("--mebibytes-per-second", type=float, default=40.0, help="of each answer (40)")
    parser.add_argument("--work", type=float, default=0.04, help="seconds of other work a batch (.04)")
    args = parser.parse_args()
    work = args.out / "work"
    with suppress(FileNotFoundError):
        shutil.rmtree(work)
    cache = work / "cache"
    make_cache(cache, args.shards, args.records)
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1",
        "XDG_CACHE_HOME": str(work / "home"),
    }  # fmt: skip
    with s3_server() as server, faulty_proxy(server, 0.0) as proxy:
        os.environ["AWS_ENDPOINT_URL"] = proxy.address
        os.environ["SOLLUNE_STORAGE"] = str(work / "first")
        remote = Location("s3", "bench/run/cache")
        store_of(remote)._files.mkdir("bench")
        shutil.copytree(cache, remote.folder)
        Mirror(remote).send()
        os.environ["SOLLUNE_STORAGE"] = str(work / "second")
        Mirror(remote).bring()
        results: dict[str, Any] = {"shards": args.shards, "bytes of a shard": Manifest.open(cache).shards[0].bytes}
        results["load average"] = os.getloadavg()
        results["libraries"] = libraries(remote, work)
        proxy.seconds_per_mebibyte = 1 / args.mebibytes_per_second
        results["first epoch"] = first_epoch(remote, proxy, args.work)
        proxy.seconds_per_mebibyte = 0.0
        results["second epoch"] = second_epoch(cache, remote.folder)
    (args.out / "storage.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
