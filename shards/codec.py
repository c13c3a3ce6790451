"""Record <-> the two members of a shard, KEY.json and KEY.safetensors; the same record always gives the same bytes.

The JSON holds what a viewer can show and always has every key with one type, because readers such as `datasets` infer
the columns from the first records and drop or truncate what comes later. The tensors are the only copy of the numbers.
"""

import json
import math
import re
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from configs.refusal import Refused
from shards.damage import Damaged
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
BLOCK = re.compile(r"[a-z0-9_]{1,40}")
TYPES = {
    "blocks": list,
    "class_name": str,
    "draws": int,
    "guidance_scale": float,
    "key": str,
    "schema_version": int,
    "seed": int,
    "text": str,
}
LETTERS = {torch.float16: "F16", torch.float32: "F32", torch.int64: "I64", torch.bool: "BOOL"}
MOST_JSON_BYTES = MOST_HEADER_BYTES = 1 << 16


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
    """The record that `encode` was given, bit for bit.

    Raises `Damaged` for bytes that `encode` did not make: nothing is guessed of them.
    """
    said = head(json_bytes)
    features = [f"{FEATURES}{block}" for block in said["blocks"]]
    try:
        tensors = _tensors(st_bytes, {**PER_PROMPT, **PER_DRAW, **dict.fromkeys(features, torch.float16)})
        if {len(tensors[name]) for name in (*PER_DRAW, *features)} != {said["draws"]}:
            raise ValueError(f"its tensors do not have {said['draws']} draws each")
        if any(tensors[name].shape[1:] != tensors["x0"].shape for name in ("x_t", "v_cond", "v_uncond")):
            raise ValueError("its states are not of the picture's shape")
    except (KeyError, TypeError, ValueError, RecursionError, SafetensorError) as error:
        raise Damaged(
            f"record {said['key']}: not good safetensors ({error}) - run sollune shards verify on its cache"
        ) from error
    return Record(
        key=said["key"],
        text=said["text"],
        class_name=said["class_name"],
        seed=said["seed"],
        guidance_scale=said["guidance_scale"],
        cond=tensors["cond"],
        x0=tensors["x0"],
        draws=Draws(**{name: tensors[name] for name in PER_DRAW}),
        features=BlockFeatures({block: tensors[f"{FEATURES}{block}"] for block in said["blocks"]}),
    )


def head(json_bytes: bytes) -> dict[str, Any]:
    """The JSON half alone: text, class name and the other things that need no tensor."""
    try:
        if len(json_bytes) > MOST_JSON_BYTES:
            raise ValueError(f"{len(json_bytes)} bytes")
        said = json.loads(json_bytes)
        version = said["schema_version"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise Damaged(
            f"a record's JSON cannot be read ({json_bytes[:40]!r}) - run sollune shards verify on its cache"
        ) from error
    if version != SCHEMA:
        raise Refused(f"record {said.get('key')}: schema {version}, this program reads schema {SCHEMA} - make it again")
    slip = _slip(said)
    if slip is None and json.dumps(said, sort_keys=True).encode() != json_bytes:
        slip = "is not in the form in which it is written"
    if slip:
        raise Damaged(f"record {said.get('key')!r:.40}: its JSON {slip} - run sollune shards verify on its cache")
    return dict(said)


def _slip(said: dict[str, Any]) -> str | None:
    """What is wrong with the names, types and values of a record's JSON."""
    if {name: type(value) for name, value in said.items()} != TYPES:
        return "has not the keys and types of the schema"
    if not KEY.fullmatch(said["key"]) or not 0 <= said["seed"] < 2**63 or said["draws"] < 1:
        return "has a key, seed or number of draws that cannot be"
    if not math.isfinite(said["guidance_scale"]):
        return "has a guidance_scale that is no number"
    blocks = said["blocks"]
    if not all(isinstance(block, str) and BLOCK.fullmatch(block) for block in blocks) or len(set(blocks)) < len(blocks):
        return "has blocks that are not names, or one twice"
    return None


def _tensors(content: bytes, wanted: dict[str, torch.dtype]) -> dict[str, Tensor]:
    """The tensors of a safetensors file that has exactly these; its header is judged before anything is made of it."""
    size = int.from_bytes(content[:8], "little")
    if size > MOST_HEADER_BYTES or 8 + size > len(content):
        raise ValueError(f"a header of {size} bytes in a file of {len(content)}")
    said = json.loads(content[8 : 8 + size])
    if not isinstance(said, dict) or set(said) != set(wanted):
        raise ValueError("it has other tensors than the schema")
    shapes = {name: said[name]["shape"] for name in wanted}
    for name, shape in shapes.items():
        if not isinstance(shape, list) or not 1 <= len(shape) <= 4 or any(type(n) is not int or n < 1 for n in shape):
            raise ValueError(f"{name} has shape {shape!r:.60}")
    framed, end = _header(wanted, shapes)
    if content[8 : 8 + size] != framed or 8 + size + end != len(content):
        raise ValueError("its header is not the one of these tensors")
    return load(content)


def _header(wanted: dict[str, torch.dtype], shapes: dict[str, list[int]]) -> tuple[bytes, int]:
    """The header of such tensors (widest type first, then by name), and the bytes that they take."""
    said, at = {}, 0
    for name in sorted(wanted, key=lambda name: (-wanted[name].itemsize, name)):
        end = at + math.prod(shapes[name]) * wanted[name].itemsize
        said[name] = {"dtype": LETTERS[wanted[name]], "shape": shapes[name], "data_offsets": [at, end]}
        at = end
    text = json.dumps(said, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8), at


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
