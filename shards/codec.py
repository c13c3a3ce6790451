"""Record <-> the two members of a shard, KEY.json and KEY.safetensors; the same record always gives the same bytes.

The JSON always has every key with one type, because readers such as `datasets` infer the columns from the first
records and drop or truncate what comes later. The tensors are the only copy of the numbers.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save
from torch import Tensor

from configs.values import PictureSize
from shards.integrity import Damaged
from shards.record import (
    FEATURES,
    LANDINGS_SCHEMA,
    NOT_PER_STATE,
    PER_STATE,
    SCHEMAS,
    STATE_FIELDS,
    BlockFeatures,
    Landings,
    Record,
    States,
    header_span,
    parse_layout,
    pixels_per_latent,
    tensors_of,
)
from stages.system.refusal import Refused

KEY_PATTERN = re.compile(r"[0-9]{9}")
BLOCK_NAME = re.compile(r"[a-z0-9_]{1,40}")
JSON_TYPES = {
    "blocks": list,
    "class_name": str,
    "draws": int,
    "guidance_scale": float,
    "key": str,
    "schema_version": int,
    "seed": int,
    "text": str,
}
SIZE_TYPES = {"height": int, "width": int}
"""What schema 2 adds to them: the picture's size in pixels."""
LANDING_TYPES = {"landings": int}
"""What schema 3 adds: the number of landings."""
MAX_PIXELS = 99_999
"""The largest side of a picture, which a size's text allows."""
MAX_BLOCKS = 256
MAX_JSON_BYTES = 1 << 16
"""A thousand times a prompt; a longer one is neither written nor read."""
VERIFY_HINT = "run sollune shards verify on its cache"


def encode(record: Record) -> tuple[bytes, bytes]:
    """The bytes of KEY.json and KEY.safetensors.

    Raises `ValueError` for a record that is not of this schema: wrong key, dtype, shape, or number of states; and
    `Refused` for a prompt that is too long to be stored.
    """
    tensors = tensors_of(record)
    _check_record(record, tensors)
    metadata = {
        "blocks": list(record.features.by_block),
        "class_name": record.class_name,
        "draws": len(record.states),
        "guidance_scale": float(record.guidance_scale),
        "key": record.key,
        "schema_version": record.schema,
        "seed": record.seed,
        "text": record.text,
    }
    if record.size is not None:
        metadata |= {"height": record.size.height, "width": record.size.width}
    if record.landings is not None:
        metadata |= {"landings": len(record.landings)}
    text = json.dumps(metadata, sort_keys=True, allow_nan=False).encode()
    if fault := _metadata_fault(metadata):
        raise ValueError(f"record {record.key}: {fault}")
    if len(text) > MAX_JSON_BYTES:
        raise Refused(
            f"record {record.key}: its texts take {len(text)} bytes, at most {MAX_JSON_BYTES} are stored - "
            "shorten its prompt, which a teacher cuts anyway"
        )
    # safetensors sorts the tensors itself; cloned, because it refuses two views of one storage.
    return text, save({name: values.detach().cpu().contiguous().clone() for name, values in tensors.items()})


def decode(json_bytes: bytes, st_bytes: bytes | bytearray | memoryview) -> Record:
    """The record that `encode` stored, bit for bit; its tensors lie in `st_bytes` itself where that can be written.

    Raises `Damaged` for bytes that `encode` did not make.
    """
    metadata = decode_metadata(json_bytes)
    blocks, size = metadata["blocks"], size_in(metadata)
    try:
        tensors = _decode_tensors(st_bytes, tuple(blocks), metadata["draws"], landings_in(metadata))
        if size is not None:
            pixels_per_latent(size, tensors["x0"].shape)
    except ValueError as error:
        raise Damaged(f"record {metadata['key']}: not good safetensors ({error}) - {VERIFY_HINT}") from error
    return Record(
        **{name: metadata[name] for name in ("key", "text", "class_name", "seed", "guidance_scale")},
        cond=tensors["cond"],
        x0=tensors["x0"],
        states=States(**{field: tensors[name] for name, field in STATE_FIELDS.items()}),
        features=BlockFeatures({block: tensors[f"{FEATURES}{block}"] for block in blocks}),
        size=size,
        landings=Landings(tensors["landing_s"], tensors["landing_x"]) if landings_in(metadata) else None,
    )


def decode_metadata(json_bytes: bytes) -> dict[str, Any]:
    """The content of KEY.json, checked; raises `Damaged`, or `Refused` for another schema."""
    try:
        if len(json_bytes) > MAX_JSON_BYTES:
            raise ValueError(f"{len(json_bytes)} bytes")
        metadata = json.loads(json_bytes)
        version = metadata["schema_version"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise Damaged(f"a record's JSON cannot be read ({json_bytes[:40]!r}) - {VERIFY_HINT}") from error
    name = f"record {metadata.get('key')!r:.40}"
    if type(version) is not int or version not in SCHEMAS:
        raise Refused(f"{name}: schema {version!r:.40}, this program reads {schemas_text()} - make it again")
    fault = _metadata_fault(metadata)
    if fault is None and json.dumps(metadata, sort_keys=True).encode() != json_bytes:
        fault = "is not in the form in which it is written"
    if fault:
        raise Damaged(f"{name}: its JSON {fault} - {VERIFY_HINT}")
    return dict(metadata)


def schemas_text() -> str:
    """The schemas that are read, for a refusal of another."""
    return f"{', '.join(map(str, SCHEMAS[:-1]))} and {SCHEMAS[-1]}"


def json_types(schema: int) -> dict[str, type]:
    """Name and type of each field of KEY.json."""
    sizes, landings = SIZE_TYPES if schema > 1 else {}, LANDING_TYPES if schema >= LANDINGS_SCHEMA else {}
    return dict(sorted({**JSON_TYPES, **sizes, **landings}.items()))


def size_in(metadata: Mapping[str, Any]) -> PictureSize | None:
    """The size that a record's JSON tells; None in schema 1."""
    return PictureSize(metadata["width"], metadata["height"]) if "width" in metadata else None


def landings_in(metadata: Mapping[str, Any]) -> int:
    """The number of landings that a record's JSON tells; 0 in schemas that have none."""
    return int(metadata.get("landings", 0))


def _metadata_fault(metadata: dict[str, Any]) -> str | None:
    """What is wrong with the names, types and values of a record's JSON."""
    if {name: type(value) for name, value in metadata.items()} != json_types(metadata["schema_version"]):
        return "has not the keys and types of the schema"
    if not all(1 <= metadata.get(name, 1) <= MAX_PIXELS for name in SIZE_TYPES):
        return "has a picture size that cannot be"
    if not KEY_PATTERN.fullmatch(metadata["key"]) or not 0 <= metadata["seed"] < 2**63 or metadata["draws"] < 1:
        return "has a key, seed or number of states that cannot be"
    if metadata.get("landings", 1) < 1:
        return "has a number of landings that cannot be"
    if not math.isfinite(metadata["guidance_scale"]):
        return "has a guidance_scale that is no number"
    # JSON can spell surrogates, which cannot be printed.
    if any("\ud800" <= letter <= "\udfff" for letter in metadata["class_name"] + metadata["text"]):
        return "has a class or text that is no Unicode text"
    blocks = metadata["blocks"]
    if not all(isinstance(block, str) and BLOCK_NAME.fullmatch(block) for block in blocks):
        return "has blocks that are not names"
    if len({*blocks}) < len(blocks) or len(blocks) > MAX_BLOCKS:
        return f"has a block twice, or more than {MAX_BLOCKS} blocks"
    return None


def _decode_tensors(
    content: bytes | bytearray | memoryview, blocks: tuple[str, ...], state_count: int, landings: int
) -> dict[str, Tensor]:
    """Every tensor of a KEY.safetensors, as a view of its bytes, so that a record takes its own size once."""
    first, last = header_span(content, len(content))
    layout = parse_layout(bytes(content[first:last]), blocks, landings)
    if layout.bytes != len(content):
        raise ValueError(f"its tensors end at byte {layout.bytes} of {len(content)}")
    if layout.states != state_count:
        raise ValueError(f"it has {layout.states} states, its JSON says {state_count}")
    buffer = bytearray(content) if memoryview(content).readonly else content
    tensors = {}
    for name, (offset, row_shape, dtype, _) in layout.tensors.items():
        shape = row_shape if name in NOT_PER_STATE else (layout.states, *row_shape)
        tensors[name] = torch.frombuffer(buffer, dtype=dtype, count=math.prod(shape), offset=offset).view(shape)
    if int(tensors["trajectory"].view(torch.uint8).max()) > 1:
        raise ValueError("trajectory holds what is neither true nor false")
    return tensors


def _check_record(record: Record, tensors: dict[str, Tensor]) -> None:
    if not KEY_PATTERN.fullmatch(record.key):
        raise ValueError(f"key {record.key!r}: should be nine digits")
    if not 0 <= record.seed < 2**63:
        raise ValueError(f"record {record.key}: seed {record.seed} does not fit into 63 bits")
    for name, values in tensors.items():
        dtype = NOT_PER_STATE.get(name) or PER_STATE.get(name, torch.float16)
        if values.dtype != dtype:
            raise ValueError(f"record {record.key}: {name} is {values.dtype}, is stored as {dtype}")
        if not 1 <= values.dim() <= 4 or not values.numel():
            raise ValueError(f"record {record.key}: {name} has shape {list(values.shape)}")
        if name not in NOT_PER_STATE and len(values) != len(record.states):
            raise ValueError(f"record {record.key}: {name} has {len(values)} states, s has {len(record.states)}")
    if record.landings is not None:
        expected = (len(record.landings), *record.x0.shape)
        if record.landings.s.dim() != 1 or record.landings.x.shape != expected:
            shape = list(record.landings.x.shape)
            raise ValueError(f"record {record.key}: landing_x has shape {shape}, should have {list(expected)}")
    if record.size is not None:
        try:
            pixels_per_latent(record.size, record.x0.shape)
        except ValueError as error:
            raise ValueError(f"record {record.key}: {error}") from error


MIN_EXPONENT, HALF_SPACING_BITS = -13, 12
"""Of float16, by frexp's exponent: half a spacing is 2^(exponent - 12), constant below 2^-14."""


def beyond_rounding(stored: Float[Tensor, "n ..."], now: Float[Tensor, "n ..."]) -> Float[Tensor, "n ..."]:
    """|now - stored|, less half a spacing of half precision there: 0 wherever `now` rounds to what is stored."""
    stored = stored.float()
    exponent = torch.frexp(stored).exponent.clamp_min(MIN_EXPONENT).masked_fill(stored == 0, MIN_EXPONENT)
    half_spacing = torch.ldexp(torch.ones_like(stored), exponent - HALF_SPACING_BITS)
    return ((now - stored).abs() - half_spacing).clamp_min(0)


def max_relative_error(
    stored: Float[Tensor, "n ..."], now: Float[Tensor, "n ..."], size: Float[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """The largest of each row of `beyond_rounding`, relative to `size` of the row plus the element's own magnitude.

    Its own too, because a conditioning has a few elements that are far larger than the others.
    """
    magnitude = stored.float().abs().flatten(1)
    return (beyond_rounding(stored, now).flatten(1) / (size[:, None] + magnitude)).amax(dim=1)


def rms(values: Float[Tensor, "n ..."]) -> Float[Tensor, " n"]:
    """Root mean square of each row."""
    return values.float().flatten(1).square().mean(dim=1).sqrt()
