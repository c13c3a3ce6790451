"""Record <-> the two members of a shard, KEY.json and KEY.safetensors; the same record always gives the same bytes.

The JSON holds what a viewer can show and always has every key with one type, because readers such as `datasets` infer
the columns from the first records and drop or truncate what comes later. The tensors are the only copy of the numbers.
"""

import json
import re
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from configs.refusal import Refused
from shards.record import SCHEMA, BlockFeatures, Draws, Record

KEY = re.compile(r"\d{9}")
PER_PROMPT = {"cond": torch.float16, "x0": torch.float16}
PER_DRAW = {
    "k": torch.int64,
    "s": torch.float32,
    "x_t": torch.float16,
    "v_cond": torch.float16,
    "v_uncond": torch.float16,
    "trajectory": torch.bool,
}
FEATURES = "features."


def encode(record: Record) -> tuple[bytes, bytes]:
    """The bytes of KEY.json and KEY.safetensors.

    Raises `ValueError` for a record that is not of this schema: wrong key, dtype, or number of draws.
    """
    tensors = {name: getattr(record, name) for name in PER_PROMPT}
    tensors |= {name: getattr(record.draws, name) for name in PER_DRAW}
    tensors |= {f"{FEATURES}{block}": values for block, values in record.features.by_block.items()}
    _check(record, tensors)
    said = {
        "blocks": list(record.features.by_block),
        "class_name": record.class_name,
        "draws": len(record.draws),
        "guidance_scale": float(record.guidance_scale),
        "key": record.key,
        "schema_version": SCHEMA,
        "seed": record.seed,
        "text": record.text,
    }
    # safetensors sorts the tensors itself; cloned, because it refuses two views of one storage.
    stored = {name: values.detach().cpu().contiguous().clone() for name, values in tensors.items()}
    return json.dumps(said, sort_keys=True, allow_nan=False).encode(), save(stored)


def decode(json_bytes: bytes, st_bytes: bytes) -> Record:
    """The record that `encode` was given, bit for bit."""
    said = head(json_bytes)
    try:
        tensors = load(st_bytes)
        draws = Draws(**{name: tensors[name] for name in PER_DRAW})
        features = BlockFeatures({block: tensors[f"{FEATURES}{block}"] for block in said["blocks"]})
        return Record(
            key=said["key"],
            text=said["text"],
            class_name=said["class_name"],
            seed=said["seed"],
            guidance_scale=said["guidance_scale"],
            cond=tensors["cond"],
            x0=tensors["x0"],
            draws=draws,
            features=features,
        )
    except KeyError as error:
        raise Refused(
            f"record {said.get('key')}: has no {error.args[0]} - run sollune shards verify on its cache"
        ) from error
    except SafetensorError as error:
        raise Refused(
            f"record {said['key']}: not good safetensors ({error}) - run sollune shards verify on its cache"
        ) from error


def head(json_bytes: bytes) -> dict[str, Any]:
    """The JSON half alone: text, class name and the other things that need no tensor."""
    try:
        said = json.loads(json_bytes)
        version = said["schema_version"]
    except (ValueError, TypeError, KeyError) as error:
        raise Refused(
            f"a record's JSON cannot be read ({json_bytes[:40]!r}) - run sollune shards verify on its cache"
        ) from error
    if version != SCHEMA:
        raise Refused(f"record {said.get('key')}: schema {version}, this program reads schema {SCHEMA} - make it again")
    return dict(said)


def _check(record: Record, tensors: dict[str, Tensor]) -> None:
    if not KEY.fullmatch(record.key):
        raise ValueError(f"key {record.key!r}: should be nine digits")
    if not 0 <= record.seed < 2**63:
        raise ValueError(f"record {record.key}: seed {record.seed} does not fit into 63 bits")
    for name, values in tensors.items():
        wanted = PER_PROMPT.get(name) or PER_DRAW.get(name, torch.float16)
        if values.dtype != wanted:
            raise ValueError(f"record {record.key}: {name} is {values.dtype}, is stored as {wanted}")
        if name not in PER_PROMPT and len(values) != len(record.draws):
            raise ValueError(f"record {record.key}: {name} has {len(values)} draws, s has {len(record.draws)}")
