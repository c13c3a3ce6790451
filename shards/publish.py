"""A dataset card and lists of the shards, with which a cache can be published as it lies and read by other loaders.

Megatron-Energon's `.nv-meta` is left out: `energon prepare` makes its index from these tars.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData, try_to_load_from_cache

from shards.codec import json_types
from shards.manifest import Manifest
from shards.reader import Reader
from shards.record import PER_LANDING, PER_PROMPT, SPLITS, Record, Split, is_latent, tensors_of
from shards.stats import ranked
from stages.system.atomic import atomic_write
from stages.system.refusal import Refused

CARD_FILE = "README.md"
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
    "class_name": "the class of the text",
    "draws": "K, the number of states",
    "guidance_scale": "w of the teacher's guided sampling",
    "key": "number of the prompt in its split, nine digits",
    "schema_version": "version of this layout",
    "seed": "of every random choice made for this picture",
    "text": "the prompt",
    "width": "of the picture in pixels",
    "height": "of the picture in pixels",
    "landings": "m, the number of landings",
    "cond": "last hidden state of the teacher's text encoder",
    "x0": "the picture: scaled latent at the end of the teacher's guided sampling",
    "landing_s": "times of the landings: 1, then the inner ends of the windows of few-step sampling; falling",
    "landing_x": "landings: the noise, then the guided trajectory at those times; where the last window ends lies x0",
    "k": "the teacher's timestep; its last one for the whole tail beyond it",
    "s": "path time, 1 is noise",
    "x_t": "the state: on the teacher's guided trajectory, or (1 - s) x0 + s eps; rounded first, velocities are at it",
    "v_cond": "velocity of the conditional branch at (x_t, s)",
    "v_uncond": "velocity of the unconditional branch at (x_t, s)",
    "trajectory": "true: a state of the guided sampling; false: x0 under fresh noise",
}

CARD_TEMPLATE = """{mark}
# {name}

The velocities of a Stable Diffusion 1.x teacher{teacher} for {records:,} prompts, {states:,} states in all: an offline
cache for distilling it into a flow-matching model on the path `x_s = (1 - s) x0 + s eps`, velocity `v = eps - x0`.

{splits}

## Fields

Each record is two members of a tar, `KEY.json` and `KEY.safetensors`. K is {states_per_record}{landings}.

{fields}

## How to read it

```python
from datasets import load_dataset  # columns json, safetensors (bytes), __key__, __url__

rows = load_dataset("THIS FOLDER OR REPOSITORY", split="train", streaming=True)
```
```python
import webdataset, safetensors.torch

rows = webdataset.WebDataset("{pattern}", shardshuffle=False)
first = safetensors.torch.load(next(iter(rows))["safetensors"])
```
```python
from shards.reader import Reader  # sollune: checks every shard's sha256, shuffles, resumes at any sample

batch = next(Reader("THIS FOLDER").batches())
```
`manifest.json` holds the sha256 of every shard, `sollune shards verify` checks them; `table.zarr`, where it is there,
holds a row for each state. `wids-train.json` and its like list the shards with their counts.
{sizes}
## Classes

{classes}

## Recipe

Everything that decides the bytes; its sha256 is `{recipe}`.

```json
{identity}
```
"""


def export_index(cache: Path, license_id: str, name: str) -> list[Path]:
    """Write README.md and a list of shards for each split into a cache; returns the files.

    Raises `Refused` for a README.md that this command did not write.
    """
    target = cache / CARD_FILE
    if target.exists() and CARD_MARK not in target.read_text(encoding="utf-8", errors="replace"):
        raise Refused(f"{target}: was not written by this command - move it away, then run the command again")
    manifest = Manifest.open(cache)
    first = next((split for split in SPLITS if manifest.shards_of(split)), None)
    if first is None:
        raise Refused(f"{cache}: holds no record yet - run its make target first")
    written = {
        f"wids-{split}.json": json.dumps(_shard_list(manifest, split, name), indent=1) + "\n"
        for split in SPLITS
        if manifest.shards_of(split)
    }
    written[CARD_FILE] = str(dataset_card(Reader(cache, first), license_id, name))
    for file, content in written.items():
        atomic_write(cache / file, content)
    return [cache / file for file in written]


def _shard_list(manifest: Manifest, split: Split, name: str) -> dict[str, object]:
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
        states=sum(shard.draws for shard in manifest.shards),
        states_per_record=len(record.states),
        landings="" if record.landings is None else f", m is {len(record.landings)}",
        splits="\n".join(_splits(manifest)),
        fields="\n".join(_fields(record, len(manifest.sizes_of()) > 1)),
        pattern=brace_pattern(manifest, splits[0]),
        sizes=_sizes_section(manifest),
        classes="\n".join(_classes(Counter(name for split in splits for name in reader.class_names(split)))),
        recipe=manifest.recipe.fingerprint(),
        identity=json.dumps(manifest.recipe.identity, indent=1, ensure_ascii=False),
    )
    return DatasetCard(f"---\n{head.to_yaml()}\n---\n{body}", ignore_metadata_errors=False)


def brace_pattern(manifest: Manifest, split: Split) -> str:
    """The paths of all shards of a split in one pattern of braces; a shard's number counts within its size."""
    parts = [
        f"{f'{size}-' if shards[0].size_in_name else ''}{{000000..{len(shards) - 1:06d}}}"
        for size in manifest.sizes_of(split)
        if (shards := [shard for shard in manifest.shards_of(split) if shard.size == size])
    ]
    return f"data/{split}-{parts[0] if len(parts) == 1 else '{' + ','.join(parts) + '}'}.tar"


def _sizes_section(manifest: Manifest) -> str:
    """How much there is of each size of pictures; nothing where the cache does not tell it."""
    lines = ["| size | split | shards | records | states | bytes |", "|---|---|---|---|---|---|"]
    for split in SPLITS:
        for size in manifest.sizes_of(split):
            shards, records, states, total = manifest.totals(split, size)
            lines.append(f"| {size} | {split} | {shards} | {records:,} | {states:,} | {total:,} |")
    if manifest.schema_version == 1:
        return ""
    return "\n".join(
        ["", "## Sizes", "", "Width x height of the pictures in pixels. A shard holds one size.", "", *lines, ""]
    )


def size_category(records: int) -> str:
    """The hub's category of a number of records."""
    return next((word for word, most in SIZE_CATEGORIES if records < most), "n>10M")


def hub_id(manifest: Manifest) -> str | None:
    """The teacher's repository, if this machine's hub cache holds it; None for a local path, which is not published."""
    location: Any = manifest.recipe.information.get("teacher_location")
    if not isinstance(location, str) or not HUB_ID.fullmatch(location):
        return None
    return location if isinstance(try_to_load_from_cache(location, "model_index.json"), str) else None


def _splits(manifest: Manifest) -> Iterator[str]:
    yield "| split | shards | records | states | bytes |\n|---|---|---|---|---|"
    for split in SPLITS:
        totals = manifest.totals(split)
        yield f"| {split} | {totals.shards} | {totals.records:,} | {totals.states:,} | {totals.bytes:,} |"


def _fields(record: Record, several_sizes: bool) -> Iterator[str]:
    yield "| member | field | type | shape | meaning |\n|---|---|---|---|---|"
    for name, kind in json_types(record.schema).items():
        yield f"| json | `{name}` | {kind.__name__} | | {MEANINGS[name]} |"
    for name, values in tensors_of(record).items():
        shape = [*map(str, values.shape[name not in PER_PROMPT :])]
        if several_sizes and is_latent(name):
            shape[-2:] = ["h", "w"]
        rows = [] if name in PER_PROMPT else ["m"] if name in PER_LANDING else ["K"]
        sizes = [*rows, *shape]
        meaning = MEANINGS.get(name, "spatial mean of the block's last resnet, conditional branch")
        dtype = str(values.dtype).removeprefix("torch.")
        yield f"| safetensors | `{name}` | {dtype} | {' x '.join(sizes)} | {meaning} |"


def _classes(counts: Counter[str]) -> Iterator[str]:
    yield "| class | records |\n|---|---|"
    shown, rest = ranked(counts)[:MAX_CLASSES], ranked(counts)[MAX_CLASSES:]
    yield from (f"| {_table_cell(name)} | {count:,} |" for name, count in shown)
    if rest:
        yield f"| and {len(rest):,} more | {sum(count for _, count in rest):,} |"


def _table_cell(name: str) -> str:
    """An untrusted text in one cell of a table."""
    return " ".join(name.replace("|", "\\|").split())
