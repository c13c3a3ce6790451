"""Whether a tokenizer fits a text encoder, as far as their files show."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from transformers import CLIPTokenizer

from stages.system.refusal import Refused
from stages.teacher_files.folder import FETCH_REMEDY, read_json

PROBE_SENTENCE = "Two small birds, 1 red & 1 blue"
"""Words, capitals, digits and marks: decoding must restore all but blanks and capitals, which CLIP's drops."""
LEGACY_TOKEN_IDS = (0, 1, 2)
"""Of bos, pad and eos in the config of CLIP-L, and so of SD1.5, whose tokenizer never used them."""
WORD_END, MERGES_HEADER = "</w>", "#version"


def check_tokenizer(where: Path, tokenizer: CLIPTokenizer, text_encoder: Mapping[str, Any]) -> None:
    """Raise `Refused` unless size, length, special tokens and words of a tokenizer fit the text encoder's config."""
    _check_size(where, tokenizer, text_encoder)
    _check_special_tokens(where, tokenizer, text_encoder)
    _check_words(where, tokenizer)
    _check_plain_files(where, tokenizer)


def _check_size(where: Path, tokenizer: CLIPTokenizer, text_encoder: Mapping[str, Any]) -> None:
    for name, value, key in (
        ("tokens", len(tokenizer), "vocab_size"),
        ("model_max_length", tokenizer.model_max_length, "max_position_embeddings"),
    ):
        if value != text_encoder[key]:
            _refuse(where, f"{name} = {value}, the text encoder's {key} is {text_encoder[key]}")
    largest = max(tokenizer.get_vocab().values())
    if largest >= text_encoder["vocab_size"]:
        _refuse(where, f"has a token of number {largest}, the text encoder knows {text_encoder['vocab_size']}")


def _check_special_tokens(where: Path, tokenizer: CLIPTokenizer, text_encoder: Mapping[str, Any]) -> None:
    known = set(tokenizer.get_vocab().values())
    for name in ("bos", "eos", "pad"):
        number, expected = getattr(tokenizer, f"{name}_token_id"), text_encoder.get(f"{name}_token_id")
        if number not in known:
            _refuse(where, f"{name}_token is {getattr(tokenizer, f'{name}_token')!r}, which is none of its tokens")
        if expected is not None and expected not in LEGACY_TOKEN_IDS and expected != number:
            _refuse(where, f"{name}_token_id is {number}, the text encoder's is {expected}")
    empty = tokenizer("").input_ids
    if empty != [tokenizer.bos_token_id, tokenizer.eos_token_id] or empty[0] == empty[1]:
        _refuse(where, f"makes {empty} of the empty sentence, which should be a begin and an end")


def _check_words(where: Path, tokenizer: CLIPTokenizer) -> None:
    ids = tokenizer(PROBE_SENTENCE, add_special_tokens=False, verbose=False).input_ids
    decoded = str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
    if "".join(decoded.split()).casefold() != "".join(PROBE_SENTENCE.split()).casefold():
        _refuse(where, f"{PROBE_SENTENCE!r} comes back as {decoded!r:.80}")
    vocabulary, merges = _vocabulary_and_merges(tokenizer)
    reachable = {"".join(pair) for pair in merges} | set(tokenizer.all_special_tokens)
    lost = [word for word in vocabulary if len(word.removesuffix(WORD_END)) > 1 and word not in reachable]
    if lost:
        _refuse(where, f"{len(lost)} of its tokens are never made by a merge, such as {min(lost)!r}")


def _check_plain_files(where: Path, tokenizer: CLIPTokenizer) -> None:
    """Refuse vocab.json and merges.txt, which other programs read, unless they hold what was loaded."""
    vocabulary, merges = _vocabulary_and_merges(tokenizer)
    vocabulary_file, merges_file = where / "vocab.json", where / "merges.txt"
    if vocabulary_file.is_file() and read_json(vocabulary_file) != vocabulary:
        _refuse(where, "vocab.json and tokenizer.json hold other tokens")
    if merges_file.is_file():
        lines = merges_file.read_text(encoding="utf-8").split("\n")
        if [line for line in lines if line and not line.startswith(MERGES_HEADER)] != list(map(" ".join, merges)):
            _refuse(where, "merges.txt and tokenizer.json hold other merges")


def _vocabulary_and_merges(tokenizer: CLIPTokenizer) -> tuple[dict[str, int], list[list[str]]]:
    """What was loaded; versions of the library write a merge as a list of two tokens or as one text."""
    model: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    return model["vocab"], [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]


def _refuse(where: Path, reason: str) -> NoReturn:
    raise Refused(f"teacher: {where}: {reason} - take the tokenizer of the same model, or {FETCH_REMEDY}")
