"""Records a second from a cache of SD1.5's record size, beside four other loaders, in one run.

    python -m venv /somewhere
    /somewhere/bin/pip install torch torchvision numpy pydantic jaxtyping safetensors 'webdataset>=1' 'zarr>=3.1' \\
        pyyaml mosaicml-streaming litdata megatron-energon
    /somewhere/bin/python -m benchmarks.loader [--records 768] [--rounds 5] [--folder DIR]
    /somewhere/bin/pip install s3fs 'moto[server]' boto3    # for --remote: the same records from an S3 server
    /somewhere/bin/python -m benchmarks.loader --remote [--tls] [--loaders sollune litdata]

They want older companions than ours (transformers 4, huggingface_hub 0), so they are no extra of pyproject: give them
a venv of their own. A loader that cannot be imported is reported as `not installed`. Some fill a buffer of 64 records
before their first batch, which no rate counts: few records flatter them.

Every measurement is a process of its own; the loaders take turns, so that what else runs on the machine meets all of
them. A rate counts from the first batch to the end of the epoch; `cold, from opening` counts from the opening of the
loader, with the buffers that some fill first. Cold: the page cache has to drop the files first.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.loader_peers import DRAWS, LOADERS, ROWS
from benchmarks.loader_remote import REMOTE_LOADERS, forget_copy, remote_environment, s3_server, upload
from configs.values import PictureSize
from shards.manifest import Recipe
from shards.record import BLOCKS, BlockFeatures, Record, States
from shards.writer import CacheWriter

WIDTHS = dict(zip(BLOCKS, (320, 640, 1280, 1280, 1280, 1280, 1280, 640, 320), strict=True))
ROOT = Path(__file__).parents[1]
SHARD = 48
LIMIT_SECONDS = 600
# As the Makefile sets it for every command, here for every loader: or else each batch is paid for in page faults.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_TOP_PAD_": "268435456",
}


def record(number: int) -> Record:
    """Random numbers in the shape of SD1.5's answers."""
    generator = torch.Generator().manual_seed(number)

    def half(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).half()

    x_s, v_cond, v_uncond = (half(DRAWS, 4, 64, 64) for _ in range(3))
    times = torch.rand(DRAWS, generator=generator)
    draws = States((times * 999).long(), times, x_s, v_cond, v_uncond, torch.arange(DRAWS) < 4)
    features = BlockFeatures({block: half(DRAWS, width) for block, width in WIDTHS.items()})
    return Record(
        f"{number:09d}",
        f"number {number}",
        "none",
        number,
        5.0,
        half(77, 768),
        half(4, 64, 64),
        draws,
        features,
        PictureSize(512, 512),
    )


def make_cache(folder: Path, records: int, shard: int = SHARD) -> None:
    """A cache of `records` records, so many of them in each shard."""
    writer = CacheWriter(folder, Recipe(identity={"benchmark": "loader"}))
    for index, first in enumerate(range(0, records, shard)):
        if not writer.is_intact("train", index, min(shard, records - first)):
            writer.add("train", index, map(record, range(first, min(first + shard, records))))


def drop_page_cache(folder: Path) -> None:
    """Ask the system to drop what it holds of these files."""
    os.sync()
    for path in (path for path in folder.rglob("*") if path.is_file()):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def epoch(loader: Any, cache: Path, folder: Path, workers: int) -> dict[str, float]:
    """One epoch: records and bytes a second after the first batch, the seconds until it, and the rate of all of it."""
    began = time.perf_counter()
    first, count, size = 0.0, 0, 0
    for _keys, tensors in loader.batches(loader.open(cache, folder, workers)):
        now = time.perf_counter()
        if not first:
            first = now
        else:
            count, size = count + len(tensors["cond"]), size + sum(values.nbytes for values in tensors.values())
    end = time.perf_counter()
    if not count:
        raise RuntimeError("gave no second batch")
    seconds, all_rows = end - first, count + len(tensors["cond"])  # the first batch is as large as the last
    return {
        "records": count / DRAWS / seconds,
        "bytes": size / seconds,
        "first": first - began,
        "whole": all_rows / DRAWS / (end - began),
    }


def resume(name: str, cache: Path, folder: Path, workers: int) -> dict[str, Any]:
    """Leave at half an epoch and go on in a new loader: seconds to its first batch, and how far off that batch is."""
    loader = LOADERS[name]
    whole = [keys for keys, _ in loader.batches(loader.open(cache, folder, workers))]
    half, opened = len(whole) // 2, loader.open(cache, folder, workers)
    stream = loader.batches(opened)
    for _ in range(half):
        next(stream)
    state = loader.state(opened, half)
    del stream, opened
    if state is None:
        return {"resume": None, "error": None}
    began = time.perf_counter()
    keys = next(loader.batches(loader.open(cache, folder, workers), state))[0]
    seconds = time.perf_counter() - began
    result = whole.index(keys) if keys in whole else None
    return {
        "resume": seconds,
        "error": None if result is None else (result - half) * ROWS // DRAWS,
        "elsewhere": result is None,
    }


def measure_loader(name: str, cache: Path, folder: Path, workers: int, what: str) -> dict[str, Any]:
    """What a child process measures."""
    if what == "convert":
        LOADERS[name].convert(cache, folder)
        return {}
    if what == "resume":
        return resume(name, cache, folder, workers)
    if what == "remote":
        forget_copy(folder)
        return {time: epoch(REMOTE_LOADERS[name], cache, folder, workers) for time in ("first", "second")}
    drop_page_cache(cache)
    drop_page_cache(folder)
    return {heat: epoch(LOADERS[name], cache, folder, workers) for heat in ("cold", "warm")}


def child(name: str, cache: Path, folder: Path, workers: int, what: str) -> dict[str, Any]:
    """The result of `one` in a fresh process, or why there is none."""
    environment = os.environ | ALLOCATOR
    words = [name, str(cache), str(folder), str(workers), what]
    try:
        ran = subprocess.run(
            [sys.executable, "-m", "benchmarks.loader", "--one", *words],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=LIMIT_SECONDS,
            check=False,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"more than {LIMIT_SECONDS} s"}
    for line in ran.stdout.splitlines():
        if line.startswith("RESULT "):
            print(f"{name}, {workers} workers, {what}: {line}", file=sys.stderr, flush=True)  # each round, as it ends
            return dict(json.loads(line.removeprefix("RESULT ")))
    last = (ran.stderr.strip().splitlines() or ["no output"])[-1]
    return {"failed": "not installed" if "ModuleNotFoundError" in last else last[:90]}


def spread(values: list[float], unit: str = "") -> str:
    """Median, and the smallest and greatest."""
    return f"{statistics.median(values):.3g}{unit} ({min(values):.3g} to {max(values):.3g})" if values else "-"


def main() -> None:
    """Make the data, let every loader convert it, measure in turns, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "sollune-loader")
    parser.add_argument("--remote", action="store_true", help="read from an S3 server of moto's")
    parser.add_argument("--tls", action="store_true", help="that server speaks https, as litdata's client wants it")
    parser.add_argument("--loaders", nargs="+", choices=LOADERS, default=list(LOADERS), help="sollune and others")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        name, cache, folder, workers, what = args.one
        print("RESULT " + json.dumps(measure_loader(name, Path(cache), Path(folder), int(workers), what)), flush=True)
        return
    args.folder = args.folder.resolve()
    names = [name for name in (REMOTE_LOADERS if args.remote else LOADERS) if name in {"sollune", *args.loaders}]
    cache = args.folder / "cache"
    make_cache(cache, args.records)
    failed: dict[str, str] = {}
    for name in names:
        if not (args.folder / name / "DONE").exists():
            result = child(name, cache, args.folder / name, 0, "convert")
            if "failed" in result:
                failed[name] = result["failed"]
                continue
            (args.folder / name).mkdir(exist_ok=True)
            (args.folder / name / "DONE").touch()
    if args.remote:
        read_remotely(cache, args.folder, names, args.rounds, args.tls, failed)
        return
    results: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for _ in range(args.rounds):
        for workers in args.workers:
            for name in (name for name in names if name not in failed):
                results.setdefault((name, workers), []).append(child(name, cache, args.folder / name, workers, "read"))
    size = sum(path.stat().st_size for path in cache.rglob("*.tar"))
    print(f"{args.records} records, {size:,} bytes, {args.rounds} rounds; median (smallest to greatest)\n")
    ratios = "ours/it cold | warm | cold, from opening"
    print(f"| loader | workers | cold rec/s | warm rec/s | warm MB/s | {ratios} | first batch |")
    print("|---|---|---|---|---|---|---|---|---|")
    for workers in args.workers:
        for name in names:
            print(line(name, workers, results, failed))
    print("\n| loader | first batch after resume at 50 % | position error, records |\n|---|---|---|")
    for name in names:
        result = {"failed": failed[name]} if name in failed else child(name, cache, args.folder / name, 0, "resume")
        off = "not in the uninterrupted order" if result.get("elsewhere") else result.get("error")
        cells = (
            (result["failed"], "-")
            if "failed" in result
            else ("cannot resume", "-")
            if result["resume"] is None
            else (f"{result['resume']:.3f} s", str(off))
        )
        print(f"| {name} | {cells[0]} | {cells[1]} |")


def read_remotely(cache: Path, folder: Path, names: list[str], rounds: int, tls: bool, failed: dict[str, str]) -> None:
    """The table of those that read from one S3 server, in one process each, without a copy at first."""
    results: dict[str, list[dict[str, Any]]] = {name: [{"failed": reason}] for name, reason in failed.items()}
    with s3_server(folder, tls) as server:
        os.environ.update(remote_environment(server, folder))
        upload({"cache": cache} | {name: folder / name for name in names})
        for _ in range(rounds):
            for name in (name for name in names if name not in failed):
                results.setdefault(name, []).append(child(name, cache, folder / name, 0, "remote"))
    size = sum(path.stat().st_size for path in cache.rglob("*.tar"))
    print(f"from S3 by {'https' if tls else 'http'}, {size:,} bytes, {rounds} rounds; median (smallest to greatest)")
    print("rates count from opening\n")
    print(
        "| loader | first epoch rec/s | second epoch rec/s | ours/it first | second | first batch of the first epoch |"
    )
    print("|---|---|---|---|---|---|")
    for name in names:
        print(remote_line(name, results))


def remote_line(name: str, results: dict[str, list[dict[str, Any]]]) -> str:
    """A row of the table of `read_remotely`; ratios are taken round by round."""
    rounds, ours = results[name], results["sollune"]
    if slips := [result["failed"] for result in rounds if "failed" in result]:
        return f"| {name} | {slips[0]} | | | | |"
    times = ("first", "second")
    cells = [spread([result[time]["whole"] for result in rounds]) for time in times]
    pairs = [(a, b) for a, b in zip(ours, rounds, strict=True) if "failed" not in a]
    cells += [spread([a[time]["whole"] / b[time]["whole"] for a, b in pairs]) for time in times]
    cells.append(spread([result["first"]["first"] for result in rounds], " s"))
    return f"| {name} | " + " | ".join(cells) + " |"


def line(name: str, workers: int, results: dict[tuple[str, int], list[dict[str, Any]]], failed: dict[str, str]) -> str:
    """A row of the table; ratios are taken round by round."""
    rounds = results.get((name, workers), [])
    slips = [result["failed"] for result in rounds if "failed" in result]
    if name in failed or slips:
        return f"| {name} | {workers} | {failed.get(name) or slips[0]} | | | | | |"
    ours = results[("sollune", workers)]
    cells = [spread([result[heat]["records"] for result in rounds]) for heat in ("cold", "warm")]
    cells.append(f"{statistics.median(result['warm']['bytes'] for result in rounds) / 1e6:.0f}")
    pairs = [(a, b) for a, b in zip(ours, rounds, strict=True) if "failed" not in a]
    for heat, rate in (("cold", "records"), ("warm", "records"), ("cold", "whole")):
        cells.append(spread([a[heat][rate] / b[heat][rate] for a, b in pairs]))
    cells.append(f"{statistics.median(result['warm']['first'] for result in rounds):.2f} s")
    return f"| {name} | {workers} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
