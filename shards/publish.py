"""The dataset card of a published cache, from facts alone.

What other loaders need beside the shards, so that a cache can be published as it lies.

Megatron-Energon's `.nv-meta` is left out: its index is a database whose making belongs to `energon prepare`, which
takes these tars as they are.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData, try_to_load_from_cache
from torch import Tensor

from shards.codec import JSON_TYPES
from shards.manifest import Manifest
from shards.reader import Reader
from shards.record import FEATURES, PER_PROMPT, PER_STATE, SPLITS, Record, Split
from shards.stats import ranked
from stages.system.atomic import atomic_write
from stages.system.refusal import Refused

CARD_MARK = "<!-- written by sollune shards export-index -->"
TAGS = ["webdataset", "distillation", "flow-matching", "sollune"]
SIZE_CATEGORIES = (
    ("n<1K", 10**3),
    ("1K<n<10K", 10**4),
    ("10K<n<100K", 10**5),
    ("100K<n<1M", 10**6),
    ("1M<n<10M", 10**7),
)
MAX_CLASSES = 50
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
MEANINGS = {
    "blocks": "names of the blocks whose features are kept",
    "class_name": "what the sentence is about",
    "draws": "K, the number of states",
    "guidance_scale": "w of the teacher's guided sampling",
    "key": "number of the prompt in its split, nine digits",
    "schema_version": "version of this layout",
    "seed": "of every random choice made for this picture",
    "text": "the sentence",
    "cond": "last hidden state of the teacher's text encoder",
    "x0": "the picture: scaled latent at the end of the teacher's guided sampling",
    "k": "the teacher's timestep; its last one for the whole tail beyond it",
    "s": "path time, 1 is noise",
    "x_t": "the state: on the teacher's guided trajectory, or (1 - s) x0 + s eps; rounded before the teacher answered",
    "v_cond": "velocity of the conditional branch at (x_t, s)",
    "v_uncond": "velocity of the unconditional branch at (x_t, s)",
    "trajectory": "true: a state of the guided sampling; false: x0 noised again",
}

CARD_TEMPLATE = """{mark}
# {name}

What a Stable Diffusion 1.x teacher{teacher} answered about {records:,} sentences, {draws:,} states in all: an offline
cache for distilling it into a flow-matching model on the path `x_s = (1 - s) x0 + s eps`, velocity `v = eps - x0`.

{splits}

## Fields

Each record is two members of a tar, `KEY.json` and `KEY.safetensors`. K is {draws_each}.

{fields}

## How to read it

```python
from datasets import load_dataset  # columns json, safetensors (bytes), __key__, __url__

rows = load_dataset("THIS FOLDER OR REPOSITORY", split="train", streaming=True)
```
```python
import webdataset, safetensors.torch

rows = webdataset.WebDataset("data/train-{{000000..{last}}}.tar", shardshuffle=False)
first = safetensors.torch.load(next(iter(rows))["safetensors"])
```
```python
from shards.reader import Reader  # sollune: checks every shard's sha256, shuffles, resumes at any sample

batch = next(Reader("THIS FOLDER").batches())
```
`manifest.json` holds the sha256 of every shard, `sollune shards verify` checks them; `table.zarr`, where it is there,
holds a row for each state. `wids-train.json` and its like list the shards with their counts.

## Classes

{classes}

## Recipe

Everything that decides the bytes; its sha256 is `{recipe}`.

```json
{identity}
```
"""


def dataset_card(reader: Reader, license_id: str, name: str) -> DatasetCard:
    """README.md with the head that the hub reads (formats: configs with globs, splits, size, tags, license)."""
    manifest = reader.manifest
    records = sum(shard.records for shard in manifest.shards)
    splits = [split for split in SPLITS if manifest.shards_of(split)]
    head = DatasetCardData(
        license=license_id,
        pretty_name=name,
        task_categories=["text-to-image"],
        size_categories=[size_category(records)],
        tags=TAGS,
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": f"data/{split}-*.tar"} for split in splits],
            }
        ],
        viewer=False,
    )
    record = next(reader.records())
    at_hub = hub_id(manifest)
    body = CARD_TEMPLATE.format(
        mark=CARD_MARK,
        name=name,
        teacher=f" (`{at_hub}`)" if at_hub else "",
        records=records,
        draws=sum(shard.draws for shard in manifest.shards),
        draws_each=len(record.states),
        splits="\n".join(_splits(manifest)),
        fields="\n".join(_fields(record)),
        last=f"{len(manifest.shards_of(splits[0])) - 1:06d}",
        classes="\n".join(_classes(Counter(name for split in splits for name in reader.class_names(split)))),
        recipe=manifest.recipe.fingerprint(),
        identity=json.dumps(manifest.recipe.identity, indent=1, ensure_ascii=False),
    )
    return DatasetCard(f"---\n{head.to_yaml()}\n---\n{body}", ignore_metadata_errors=False)


def size_category(records: int) -> str:
    """The hub's word for a number of records."""
    return next((word for word, most in SIZE_CATEGORIES if records < most), "n>10M")


def hub_id(manifest: Manifest) -> str | None:
    """The teacher's repository, if it is one that this machine's hub cache knows: a local path is nobody's business."""
    said: Any = manifest.recipe.information.get("teacher_location")
    if not isinstance(said, str) or not HUB_ID.fullmatch(said):
        return None
    return said if isinstance(try_to_load_from_cache(said, "model_index.json"), str) else None


def _splits(manifest: Manifest) -> Iterator[str]:
    yield "| split | shards | records | states | bytes |\n|---|---|---|---|---|"
    for split in SPLITS:
        shards = manifest.shards_of(split)
        sums = [sum(getattr(shard, name) for shard in shards) for name in ("records", "draws", "bytes")]
        yield f"| {split} | {len(shards)} | {sums[0]:,} | {sums[1]:,} | {sums[2]:,} |"


def _fields(record: Record) -> Iterator[str]:
    yield "| member | field | type | shape | meaning |\n|---|---|---|---|---|"
    yield from (f"| json | `{name}` | {kind.__name__} | | {MEANINGS[name]} |" for name, kind in JSON_TYPES.items())
    tensors: dict[str, Tensor] = {name: getattr(record, name) for name in PER_PROMPT}
    tensors |= {name: getattr(record.states, name) for name in PER_STATE}
    tensors |= {f"{FEATURES}{block}": values for block, values in record.features.by_block.items()}
    for name, values in tensors.items():
        sizes = [*map(str, values.shape)] if name in PER_PROMPT else ["K", *map(str, values.shape[1:])]
        meaning = MEANINGS.get(name, "spatial mean of the block's last resnet, conditional branch")
        kind = str(values.dtype).removeprefix("torch.")
        yield f"| safetensors | `{name}` | {kind} | {' x '.join(sizes)} | {meaning} |"


def _classes(counts: Counter[str]) -> Iterator[str]:
    yield "| class | records |\n|---|---|"
    shown, rest = ranked(counts)[:MAX_CLASSES], ranked(counts)[MAX_CLASSES:]
    yield from (f"| {_table_cell(name)} | {count:,} |" for name, count in shown)
    if rest:
        yield f"| and {len(rest):,} more | {sum(count for _, count in rest):,} |"


def _table_cell(name: str) -> str:
    """A stranger's word in one cell of a table."""
    return " ".join(name.replace("|", "\\|").split())


CARD_FILE = "README.md"


def export_index(cache: Path, license_id: str, name: str) -> list[Path]:
    """Write README.md and a list of shards for each split into a cache; returns the files.

    Raises `Refused` rather than write over a README.md of somebody else.
    """
    target = cache / CARD_FILE
    if target.exists() and CARD_MARK not in target.read_text(encoding="utf-8", errors="replace"):
        raise Refused(f"{target}: was not written by this command - move it away, then run the command again")
    manifest = Manifest.open(cache)
    first = next((split for split in SPLITS if manifest.shards_of(split)), None)
    if first is None:
        raise Refused(f"{cache}: holds no record yet - run its make target first")
    written = dict(_shard_lists(manifest, name))
    written[CARD_FILE] = str(dataset_card(Reader(cache, first), license_id, name))
    for file, content in written.items():
        atomic_write(cache / file, content)
    return [cache / file for file in written]


def _shard_lists(manifest: Manifest, name: str) -> Iterator[tuple[str, str]]:
    for split in SPLITS:
        if manifest.shards_of(split):
            yield f"wids-{split}.json", json.dumps(shard_list(manifest, split, name), indent=1) + "\n"


def shard_list(manifest: Manifest, split: Split, name: str) -> dict[str, object]:
    """A split's shards with their counts, in the form that `wids` reads for random access."""
    shards = manifest.shards_of(split)
    return {
        "wids_version": 1,
        "name": f"{name}-{split}",
        "length": sum(shard.records for shard in shards),
        "shardlist": [
            {"url": shard.file, "nsamples": shard.records, "filesize": shard.bytes, "dataset": split}
            for shard in shards
        ],
    }
