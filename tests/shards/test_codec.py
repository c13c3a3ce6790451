import dataclasses
import hashlib
import json

import numpy as np
import pytest
import torch

from configs.values import PictureSize
from shards.codec import decode, encode
from shards.integrity import Damaged
from shards.record import STATE_FIELDS, BlockFeatures
from stages.system.refusal import Refused


def is_bit_equal(a, b):
    """Whether two tensors hold the same bits."""
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()


def test_a_record_comes_back_bit_for_bit(make_record):
    sent = make_record(5)
    back = decode(*encode(sent))
    for name in ("key", "text", "class_name", "seed", "guidance_scale"):
        assert getattr(back, name) == getattr(sent, name)
    assert is_bit_equal(back.cond, sent.cond)
    assert is_bit_equal(back.x0, sent.x0)
    assert all(is_bit_equal(getattr(back.states, name), getattr(sent.states, name)) for name in STATE_FIELDS.values())
    assert list(back.features.by_block) == ["mid", "down_0"]
    assert all(is_bit_equal(back.features.by_block[block], values) for block, values in sent.features.by_block.items())


def test_encoding_what_was_decoded_gives_the_same_bytes(make_record):
    stored = encode(make_record(5))
    assert encode(decode(*stored)) == stored


def test_negative_zero_infinity_and_nan_survive(make_record):
    sent = make_record(1)
    odd = torch.tensor([-0.0, float("inf"), float("-inf"), float("nan")]).half()
    sent.x0.view(-1)[:4] = odd
    assert is_bit_equal(decode(*encode(sent)).x0, sent.x0)


STORED = {  # in the order of the file: widest type first, then by name
    "k": ("I64", "<i8", [2]),
    "s": ("F32", "<f4", [2]),
    "cond": ("F16", "<f2", [6, 7]),
    "features.down_0": ("F16", "<f2", [2, 3]),
    "features.mid": ("F16", "<f2", [2, 8]),
    "v_cond": ("F16", "<f2", [2, 3, 4, 5]),
    "v_uncond": ("F16", "<f2", [2, 3, 4, 5]),
    "x0": ("F16", "<f2", [3, 4, 5]),
    "x_t": ("F16", "<f2", [2, 3, 4, 5]),
    "trajectory": ("BOOL", "?", [2]),
}


def encode_by_hand(values):
    """A safetensors file of STORED whose tensors all count up through `values`, by the format's description."""
    header, body = {}, b""
    for name, (kind, dtype, shape) in STORED.items():
        part = np.resize(values, shape).astype(dtype).tobytes()
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [len(body), len(body) + len(part)]}
        body += part
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


@pytest.mark.parametrize(
    ("size", "schema", "height", "width"),
    [(None, b"1", b"", b""), (PictureSize(40, 32), b"2", b'"height": 32, ', b', "width": 40')],
)
def test_the_bytes_are_the_ones_of_their_schema(make_record, size, schema, height, width):
    sent = dataclasses.replace(make_record(0), size=size)
    features = sent.features.by_block.values()
    for values in (sent.cond, sent.x0, *(getattr(sent.states, name) for name in STATE_FIELDS.values()), *features):
        values.copy_(torch.arange(values.numel()).view_as(values) % 7)
    json_bytes, st_bytes = encode(sent)
    assert json_bytes == (
        b'{"blocks": ["mid", "down_0"], "class_name": "shape/star", "draws": 2, "guidance_scale": 3.0, '
        + height
        + b'"key": "000000000", "schema_version": '
        + schema
        + b', "seed": 4611686018427387904, "text": "a star, number 0"'
        + width
        + b"}"
    )
    assert decode(json_bytes, st_bytes).size == size
    assert st_bytes == encode_by_hand(np.arange(7))
    assert hashlib.sha256(st_bytes).hexdigest() == "65f30744110fac43a4e9f3cb9a51f6a08b6fee3fd490bf149a385c6d5951d1fd"


def test_a_whole_guidance_scale_is_written_as_a_float(make_record):
    metadata = encode(dataclasses.replace(make_record(0), guidance_scale=5))[0]
    assert b'"guidance_scale": 5.0' in metadata


def test_every_json_has_the_same_keys_and_types(make_record):
    a, b = (json.loads(encode(make_record(number))[0]) for number in (0, 8))
    assert {name: type(value) for name, value in a.items()} == {name: type(value) for name, value in b.items()}


def test_views_of_one_storage_are_stored_as_any_other_tensor(make_record):
    sent = make_record(2)
    both = torch.stack([sent.states.v_cond, sent.states.v_uncond])
    views = dataclasses.replace(sent, states=dataclasses.replace(sent.states, v_cond=both[0], v_uncond=both[1]))
    assert encode(views) == encode(sent)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"key": "12"}, "nine digits"),
        ({"seed": 2**63}, "63 bits"),
        ({"x0": torch.zeros(3, 4, 5)}, "x0 is torch.float32"),
        ({"guidance_scale": float("nan")}, "JSON"),
    ],
)
def test_what_is_not_of_the_schema_is_not_written(make_record, change, words):
    with pytest.raises(ValueError, match=words):
        encode(dataclasses.replace(make_record(0), **change))


def test_features_of_another_number_of_states_are_not_written(make_record):
    mixed = dataclasses.replace(make_record(0), features=make_record(0, state_count=3).features)
    with pytest.raises(ValueError, match=r"features\.mid has 3 states, s has 2"):
        encode(mixed)


def test_another_schema_is_refused(make_record):
    json_bytes, st_bytes = encode(make_record(0))
    for other in (b"4", b"0", b"true", b"2.0", b'"2"', b"null"):
        with pytest.raises(Refused, match=r"record '000000000': schema .*, this program reads 1, 2 and 3"):
            decode(json_bytes.replace(b'"schema_version": 2', b'"schema_version": ' + other), st_bytes)


@pytest.mark.parametrize(
    ("height", "width"), [(32, 41), (32, 32), (40, 32), (33, 40), (0, 40), (-32, -40), (100_000, 125_000), (3, 5)]
)
def test_a_size_that_the_latent_does_not_have_is_refused(make_record, height, width):
    json_bytes, st_bytes = encode(make_record(0))
    fields = json.loads(json_bytes) | {"height": height, "width": width}
    with pytest.raises(Damaged, match=r"no latent of a picture of|a picture size that cannot be"):
        decode(json.dumps(fields, sort_keys=True).encode(), st_bytes)
    if min(height, width) > 0:
        with pytest.raises(ValueError, match=r"record 000000000: .*(no latent|cannot be)"):
            encode(dataclasses.replace(make_record(0), size=PictureSize(width, height)))


def test_a_schema_has_its_own_fields_and_no_others(make_record):
    json_bytes, st_bytes = encode(make_record(0))
    fields = json.loads(json_bytes)
    for changed in ({**fields, "schema_version": 1}, {n: v for n, v in fields.items() if n != "width"}):
        with pytest.raises(Damaged, match="has not the keys and types of the schema"):
            decode(json.dumps(changed, sort_keys=True).encode(), st_bytes)


@pytest.mark.parametrize("cut", [slice(0, 20), slice(0, -1)])
def test_broken_bytes_are_refused(make_record, cut):
    json_bytes, st_bytes = encode(make_record(0))
    with pytest.raises(Refused, match="cannot be read"):
        decode(json_bytes[cut], st_bytes)
    with pytest.raises(Refused, match="record 000000000: not good safetensors"):
        decode(json_bytes, st_bytes[cut])


def test_a_prompt_too_long_to_be_read_again_is_not_written(make_record):
    encode(dataclasses.replace(make_record(0), text="x" * 60_000))
    with pytest.raises(Refused, match=r"record 000000000: its texts take .* at most 65536 are stored"):
        encode(dataclasses.replace(make_record(0), text="x" * 66_000))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"text": "half a letter \ud83d"}, "is no Unicode text"),
        ({"features": BlockFeatures({"Mid/0": torch.zeros(2, 3).half()})}, "has blocks that are not names"),
        ({"x0": torch.zeros(0, 4, 5).half()}, "x0 has shape"),
    ],
)
def test_what_would_not_be_read_again_is_not_written(make_record, change, words):
    with pytest.raises(ValueError, match=words):
        encode(dataclasses.replace(make_record(0), **change))


def test_a_truth_value_is_true_or_false(make_record):
    json_bytes, st_bytes = encode(make_record(0))
    assert st_bytes[-2:] == b"\1\0"  # trajectory lies last
    with pytest.raises(Refused, match="trajectory holds what is neither true nor false"):
        decode(json_bytes, st_bytes[:-1] + b"\2")


def test_tensors_lie_in_the_bytes_that_were_read_where_these_can_be_written(make_record):
    json_bytes, st_bytes = encode(make_record(0))
    buffer = bytearray(st_bytes)
    back = decode(json_bytes, buffer)
    back.x0.zero_()
    assert bytes(buffer) != st_bytes
    assert decode(json_bytes, st_bytes).x0.equal(make_record(0).x0)
