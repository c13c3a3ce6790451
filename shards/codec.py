"""Record <-> the two members of a shard, KEY.json and KEY.safetensors; the same record always gives the same bytes.

The JSON holds what a viewer can show and always has every key with one type, because readers such as `datasets` infer
the columns from the first records and drop or truncate what comes later. The tensors are the only copy of the numbers.

How far a number is from one that was stored in half precision, beyond what the rounding itself explains.
"""

import json
import math
import re
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save
from torch import Tensor

from shards.integrity import Damaged
from shards.record import (
    FEATURES,
    PER_PROMPT,
    PER_STATE,
    SCHEMA,
    BlockFeatures,
    Record,
    States,
    header_span,
    parse_layout,
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
MAX_BLOCKS = 256
MAX_JSON_BYTES = 1 << 16
"""A thousand times a prompt; what is longer is neither written nor read."""


def encode(record: Record) -> tuple[bytes, bytes]:
    """The bytes of KEY.json and KEY.safetensors.

    Raises `ValueError` for a record that is not of this schema: wrong key, dtype, shape, or number of draws; and
    `Refused` for a prompt that is too long to be stored.
    """
    tensors = {name: getattr(record, name) for name in PER_PROMPT}
    tensors |= {name: getattr(record.states, name) for name in PER_STATE}
    tensors |= {f"{FEATURES}{block}": values for block, values in record.features.by_block.items()}
    _check_record(record, tensors)
    said = {
        "blocks": list(record.features.by_block),
        "class_name": record.class_name,
        "draws": len(record.states),
        "guidance_scale": float(record.guidance_scale),
        "key": record.key,
        "schema_version": SCHEMA,
        "seed": record.seed,
        "text": record.text,
    }
    text = json.dumps(said, sort_keys=True, allow_nan=False).encode()
    if slip := _metadata_fault(said):
        raise ValueError(f"record {record.key}: {slip}")
    if len(text) > MAX_JSON_BYTES:
        raise Refused(
            f"record {record.key}: its words take {len(text)} bytes, at most {MAX_JSON_BYTES} are stored - "
            "shorten its prompt, which a teacher cuts anyway"
        )
    # safetensors sorts the tensors itself; cloned, because it refuses two views of one storage.
    return text, save({name: values.detach().cpu().contiguous().clone() for name, values in tensors.items()})


def decode(json_bytes: bytes, st_bytes: bytes | bytearray | memoryview) -> Record:
    """The record that `encode` was given, bit for bit; its tensors lie in `st_bytes` itself where that can be written.

    Raises `Damaged` for bytes that `encode` did not make: nothing is guessed of them.
    """
    said = decode_metadata(json_bytes)
    try:
        tensors = _decode_tensors(st_bytes, tuple(said["blocks"]), said["draws"])
    except ValueError as error:
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
        states=States(**{name: tensors[name] for name in PER_STATE}),
        features=BlockFeatures({block: tensors[f"{FEATURES}{block}"] for block in said["blocks"]}),
    )


def decode_metadata(json_bytes: bytes) -> dict[str, Any]:
    """The JSON half alone: text, class name and the other things that need no tensor."""
    try:
        if len(json_bytes) > MAX_JSON_BYTES:
            raise ValueError(f"{len(json_bytes)} bytes")
        said = json.loads(json_bytes)
        version = said["schema_version"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise Damaged(
            f"a record's JSON cannot be read ({json_bytes[:40]!r}) - run sollune shards verify on its cache"
        ) from error
    if version != SCHEMA:
        raise Refused(
            f"record {said.get('key')!r:.40}: schema {version!r:.40}, this program reads {SCHEMA} - make it again"
        )
    slip = _metadata_fault(said)
    if slip is None and json.dumps(said, sort_keys=True).encode() != json_bytes:
        slip = "is not in the form in which it is written"
    if slip:
        raise Damaged(f"record {said.get('key')!r:.40}: its JSON {slip} - run sollune shards verify on its cache")
    return dict(said)


def _metadata_fault(metadata: dict[str, Any]) -> str | None:
    """What is wrong with the names, types and values of a record's JSON."""
    if {name: type(value) for name, value in metadata.items()} != JSON_TYPES:
        return "has not the keys and types of the schema"
    if not KEY_PATTERN.fullmatch(metadata["key"]) or not 0 <= metadata["seed"] < 2**63 or metadata["draws"] < 1:
        return "has a key, seed or number of draws that cannot be"
    if not math.isfinite(metadata["guidance_scale"]):
        return "has a guidance_scale that is no number"
    if not all(_is_text(metadata[name]) for name in ("class_name", "text")):
        return "has words that are no text"
    blocks = metadata["blocks"]
    if not all(isinstance(block, str) and BLOCK_NAME.fullmatch(block) for block in blocks) or len(set(blocks)) < len(
        blocks
    ):
        return "has blocks that are not names, or one twice"
    if len(blocks) > MAX_BLOCKS:
        return f"has {len(blocks)} blocks"
    return None


def _is_text(word: str) -> bool:
    """Whether it can be printed: JSON can spell halves of a letter, which cannot."""
    return not any("\ud800" <= letter <= "\udfff" for letter in word)


def _decode_tensors(
    content: bytes | bytearray | memoryview, blocks: tuple[str, ...], state_count: int
) -> dict[str, Tensor]:
    """Every tensor of a KEY.safetensors, as a view of its bytes: what is read takes its own size once."""
    first, last = header_span(content, len(content))
    layout = parse_layout(bytes(content[first:last]), blocks)
    if layout.bytes != len(content):
        raise ValueError(f"its tensors end at byte {layout.bytes} of {len(content)}")
    if layout.states != state_count:
        raise ValueError(f"it has {layout.states} draws, its JSON says {state_count}")
    room = bytearray(content) if memoryview(content).readonly else content
    found = {}
    for name, part in layout.tensors.items():
        rows = layout.rows_of(name)
        flat = torch.frombuffer(room, dtype=part.dtype, count=rows * math.prod(part.shape), offset=part.offset)
        found[name] = flat.view(part.shape if name in PER_PROMPT else (rows, *part.shape))
    if int(found["trajectory"].view(torch.uint8).max()) > 1:
        raise ValueError("trajectory holds what is neither true nor false")
    return found


def _check_record(record: Record, tensors: dict[str, Tensor]) -> None:
    if not KEY_PATTERN.fullmatch(record.key):
        raise ValueError(f"key {record.key!r}: should be nine digits")
    if not 0 <= record.seed < 2**63:
        raise ValueError(f"record {record.key}: seed {record.seed} does not fit into 63 bits")
    for name, values in tensors.items():
        wanted = PER_PROMPT.get(name) or PER_STATE.get(name, torch.float16)
        if values.dtype != wanted:
            raise ValueError(f"record {record.key}: {name} is {values.dtype}, is stored as {wanted}")
        if not 1 <= values.dim() <= 4 or not values.numel():
            raise ValueError(f"record {record.key}: {name} has shape {list(values.shape)}")
        if name not in PER_PROMPT and len(values) != len(record.states):
            raise ValueError(f"record {record.key}: {name} has {len(values)} draws, s has {len(record.states)}")


MIN_EXPONENT, HALF_SPACING_BITS = -13, 12
"""As frexp counts: half of a spacing is 2^(exponent - 12), and below 2^-14 spacings do not shrink any more."""


def beyond_rounding(stored: Float[Tensor, "n ..."], now: Float[Tensor, "n ..."]) -> Float[Tensor, "n ..."]:
    """|now - stored|, less half a spacing of half precision there: 0 wherever `now` rounds to what is stored."""
    stored = stored.float()
    return ((now - stored).abs() - _half_spacing(stored)).clamp_min(0)


def max_relative_error(
    stored: Float[Tensor, "n ..."], now: Float[Tensor, "n ..."], size: Float[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """The worst of each row, in units of its size.

    The size of an element is that of its row and its own: a conditioning has a few elements that are far larger.
    """
    own = stored.float().abs().flatten(1)
    return (beyond_rounding(stored, now).flatten(1) / (size[:, None] + own)).amax(dim=1)


def rms(values: Float[Tensor, "n ..."]) -> Float[Tensor, " n"]:
    """Root mean square of each row."""
    return values.float().flatten(1).square().mean(dim=1).sqrt()


def _half_spacing(stored: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Half the distance from a number in half precision to the next larger one."""
    exponent = torch.frexp(stored).exponent.clamp_min(MIN_EXPONENT)
    exponent = exponent.masked_fill(stored == 0, MIN_EXPONENT)
    return torch.ldexp(torch.ones_like(stored), exponent - HALF_SPACING_BITS)
