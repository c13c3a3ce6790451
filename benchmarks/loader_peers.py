"""Other loaders over the same records: each writes its own copy by its own writer and reads it by its own reader.

Each yields batches of `RECORDS` whole records as 48 rows, so each reads a record once and shuffles records, not
draws; ours reads each draw by itself and shuffles draws. What is not installed says so by its `ImportError`.
"""

import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from shards.reader import Reader
from shards.record import Record, tensors_of

RECORDS, DRAWS, BUFFER = 8, 6, 64
ROWS = RECORDS * DRAWS
Batch = tuple[list[str], dict[str, torch.Tensor]]


def flatten_record(record: Record) -> dict[str, torch.Tensor]:
    """A record as named tensors."""
    return {name: values for name, values in tensors_of(record).items() if name != "trajectory"}


def rows(samples: list[dict[str, Any]]) -> Batch:
    """The rows of whole records: each of its draws with the record's own condition."""
    keys = [str(sample["key"]) for sample in samples]
    names = [name for name in samples[0] if name not in ("key", "x0", "trajectory") and not name.startswith("__")]
    made = {}
    for name in names:
        values = [torch.as_tensor(sample[name]) for sample in samples]
        joined = torch.stack(values).repeat_interleave(DRAWS, 0) if name == "cond" else torch.cat(values)
        made[name] = joined
    return keys, made


class Ours:
    """shards.reader, from the disk and not from memory, with threads."""

    def convert(self, cache: Path, folder: Path) -> None:
        """Nothing to do: these are our shards."""

    def open(self, cache: Path, _folder: Path, workers: int) -> Any:
        """The reader of a real-size cache: none of it is held in memory."""
        return Reader(cache, batch_size=ROWS, memory_budget_bytes=0, workers=workers)

    def batches(self, reader: Any, state: Any = None) -> Iterator[Batch]:
        """One epoch, or what is left of it."""
        start = state or 0
        stream = reader.batches(start)
        for _ in range((reader.samples_per_epoch - start) // ROWS):
            b = next(stream)
            keys = [f"{key}/{draw}" for key, draw in zip(b.keys, b.state_index.tolist(), strict=True)]
            yield keys, {"cond": b.cond, "x_t": b.x_s, "v_cond": b.v_cond, "v_uncond": b.v_uncond, **b.features}

    def state(self, _reader: Any, batches_seen: int) -> Any:
        """A number."""
        return batches_seen * ROWS


class WebDataset:
    """webdataset reads our tars as they are; it has no state to resume from."""

    def convert(self, cache: Path, folder: Path) -> None:
        """Nothing to do: our shards are written by webdataset's TarWriter."""

    def open(self, cache: Path, _folder: Path, workers: int) -> Any:
        """Shards in random order, records through a buffer."""
        import webdataset as wds

        urls = [str(path) for path in sorted((cache / "data").glob("train-*.tar"))]
        stream = wds.WebDataset(urls, shardshuffle=len(urls), seed=0, empty_check=False).shuffle(BUFFER)
        stream = stream.map(_decode).batched(RECORDS, collation_fn=rows)
        return torch.utils.data.DataLoader(stream, batch_size=None, num_workers=workers)

    def batches(self, loader: Any, state: Any = None) -> Iterator[Batch]:
        """One epoch."""
        yield from loader

    def state(self, _loader: Any, _batches_seen: int) -> Any:
        """webdataset starts a new epoch instead."""
        return


def _decode(sample: dict[str, Any]) -> dict[str, Any]:
    from safetensors.torch import load

    return {"key": sample["__key__"], **load(sample["safetensors"])}


class Mosaic:
    """mosaicml-streaming, on MDS shards."""

    def convert(self, cache: Path, folder: Path) -> None:
        """Write MDS with a typed column for each tensor."""
        from streaming import MDSWriter

        writer = None
        for record in Reader(cache).records():
            tensors = {name: values.numpy() for name, values in flatten_record(record).items()}
            if writer is None:
                kinds = {n: f"ndarray:{v.dtype}:{','.join(map(str, v.shape))}" for n, v in tensors.items()}
                writer = MDSWriter(out=str(folder), columns={"key": "str", **kinds}, size_limit=1 << 26)
            writer.write({"key": record.key, **tensors})
        if writer:
            writer.finish()

    def open(self, _cache: Path, folder: Path, workers: int) -> Any:
        """Its elastic order, py1e by default."""
        from streaming import StreamingDataLoader, StreamingDataset
        from streaming.base.util import clean_stale_shared_memory

        clean_stale_shared_memory()
        stream = StreamingDataset(local=str(folder), shuffle=True, shuffle_seed=0, batch_size=RECORDS)
        return StreamingDataLoader(stream, batch_size=RECORDS, num_workers=workers, collate_fn=rows)

    def batches(self, loader: Any, state: Any = None) -> Iterator[Batch]:
        """One epoch, or what is left of it."""
        if state is not None:
            loader.load_state_dict(state)
        yield from loader

    def state(self, loader: Any, _batches_seen: int) -> Any:
        """Its own state."""
        return loader.state_dict()


class LitData(Mosaic):
    """litdata, on its optimised chunks."""

    def convert(self, cache: Path, folder: Path) -> None:
        """Write chunks by `litdata.optimize`."""
        import litdata

        count = Reader(cache).samples_per_epoch // DRAWS
        make = partial(_numbered, str(cache))
        litdata.optimize(
            fn=make, inputs=list(range(count)), output_dir=str(folder), chunk_bytes="64MB", num_workers=1, verbose=False
        )

    def open(self, _cache: Path, folder: Path, workers: int) -> Any:
        """Chunks permuted, records permuted in them."""
        import litdata

        stream = litdata.StreamingDataset(str(folder), shuffle=True, seed=0)
        return litdata.StreamingDataLoader(stream, batch_size=RECORDS, num_workers=workers, collate_fn=rows)


def _numbered(cache: str, number: int) -> dict[str, Any]:
    record = Reader(Path(cache)).record_at(number)
    return {"key": record.key, **flatten_record(record)}


class Energon:
    """megatron-energon, on our tars with its own index beside a copy of them."""

    def convert(self, cache: Path, folder: Path) -> None:
        """Copy the tars and let `energon prepare` index them."""
        import megatron.energon  # noqa: F401

        folder.mkdir(parents=True, exist_ok=True)
        for tar in sorted((cache / "data").glob("train-*.tar")):
            (folder / tar.name).write_bytes(tar.read_bytes())
        command = [str(Path(sys.executable).parent / "energon"), "prepare", str(folder), "--non-interactive"]
        command += [
            "--split-ratio",
            "1,0,0",
            "--num-workers",
            "1",
            "--sample-type",
            "CrudeWebdataset",
            "--force-overwrite",
        ]
        subprocess.run(command, check=True, capture_output=True, text=True)
        (folder / ".nv-meta" / "dataset.yaml").write_text("__module__: megatron.energon\n__class__: CrudeWebdataset\n")

    def open(self, _cache: Path, folder: Path, workers: int) -> Any:
        """One epoch needs its validation reader; the training reader repeats for ever."""
        from megatron.energon import DefaultTaskEncoder, WorkerConfig, get_savable_loader, get_train_dataset, stateless
        from megatron.energon.task_encoder.cooking import Cooker

        class Encoder(DefaultTaskEncoder):
            cookers = (Cooker(stateless(_cook_sample)),)
            decoder = None

            @stateless
            def batch(self, samples: list[Any]) -> Any:
                return rows([sample["tensors"] for sample in samples])

            @stateless
            def encode_batch(self, batch: Any) -> Any:
                return batch

        config = WorkerConfig(rank=0, world_size=1, num_workers=workers)
        stream = get_train_dataset(
            str(folder),
            worker_config=config,
            batch_size=RECORDS,
            shuffle_buffer_size=BUFFER,
            max_samples_per_sequence=None,
            task_encoder=Encoder(),
            repeat=False,
        )
        return get_savable_loader(stream)

    def batches(self, loader: Any, state: Any = None) -> Iterator[Batch]:
        """One epoch, or what is left of it."""
        if state is not None:
            loader.restore_state_rank(state)
        yield from loader

    def state(self, loader: Any, _batches_seen: int) -> Any:
        """Its own state."""
        return loader.save_state_rank()


def _cook_sample(sample: dict[str, Any]) -> dict[str, Any]:
    from safetensors.torch import load

    return {
        "__key__": sample["__key__"],
        "__restore_key__": sample["__restore_key__"],
        "tensors": {"key": sample["__key__"].rsplit("/", 1)[-1], **load(sample["safetensors"])},
    }


LOADERS = {
    "sollune": Ours(),
    "webdataset": WebDataset(),
    "mosaicml-streaming": Mosaic(),
    "litdata": LitData(),
    "megatron-energon": Energon(),
}
