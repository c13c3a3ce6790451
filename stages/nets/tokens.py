"""Whether a tokenizer is the one that a text encoder was trained with, as far as their files can tell."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from transformers import CLIPTokenizer

from stages.nets.files import FETCH_REMEDY, read_json
from stages.system.refusal import Refused

PROBE_SENTENCE = "Two small birds, 1 red & 1 blue"
"""Words, capitals, digits and marks: it must come back but for blanks and capitals, which CLIP's does not keep."""
LEGACY_TOKEN_IDS = (0, 1, 2)
"""Of bos, pad and eos in the config of CLIP-L, and so of Stable Diffusion 1.5, which its tokenizer never used."""
WORD_END, MERGES_HEADER = "</w>", "#version"


def check_tokenizer(where: Path, tokenizer: CLIPTokenizer, text_encoder: Mapping[str, Any]) -> None:
    """Raise `Refused` unless size, length, special tokens and words of a tokenizer fit the text encoder's config."""
    _check_size(where, tokenizer, text_encoder)
    _check_special_tokens(where, tokenizer, text_encoder)
    _check_words(where, tokenizer)
    _check_plain_files(where, tokenizer)


def _check_size(where: Path, tokenizer: CLIPTokenizer, text_encoder: Mapping[str, Any]) -> None:
    for ours, value, theirs in (
        ("tokens", len(tokenizer), "vocab_size"),
        ("model_max_length", tokenizer.model_max_length, "max_position_embeddings"),
    ):
        if value != text_encoder[theirs]:
            _refuse(where, f"{ours} = {value}, the text encoder's {theirs} is {text_encoder[theirs]}")
    most = max(tokenizer.get_vocab().values())
    if most >= text_encoder["vocab_size"]:
        _refuse(where, f"has a token of number {most}, the text encoder knows {text_encoder['vocab_size']}")


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
    numbers = tokenizer(PROBE_SENTENCE, add_special_tokens=False, verbose=False).input_ids
    back = str(tokenizer.decode(numbers, clean_up_tokenization_spaces=False))
    if _normalize(back) != _normalize(PROBE_SENTENCE):
        _refuse(where, f"{PROBE_SENTENCE!r} comes back as {back!r:.80}")
    model = _tokenizer_model(tokenizer)
    made = {"".join(pair) for pair in model["merges"]}
    special = set(tokenizer.all_special_tokens)
    lost = [word for word in model["vocab"] if len(word.removesuffix(WORD_END)) > 1 and word not in made | special]
    if lost:
        _refuse(where, f"{len(lost)} of its tokens are never made by a merge, such as {min(lost)!r}")


def _check_plain_files(where: Path, tokenizer: CLIPTokenizer) -> None:
    """What other programs read, vocab.json and merges.txt, must be what was loaded, tokenizer.json as a rule."""
    model = _tokenizer_model(tokenizer)
    vocabulary, merges = where / "vocab.json", where / "merges.txt"
    if vocabulary.is_file() and read_json(vocabulary) != model["vocab"]:
        _refuse(where, "vocab.json and tokenizer.json hold other tokens")
    if merges.is_file():
        lines = [line for line in merges.read_text(encoding="utf-8").split("\n") if line]
        if [line for line in lines if not line.startswith(MERGES_HEADER)] != [
            " ".join(pair) for pair in model["merges"]
        ]:
            _refuse(where, "merges.txt and tokenizer.json hold other merges")


def _tokenizer_model(tokenizer: CLIPTokenizer) -> dict[str, Any]:
    """Tokens and merges that were loaded; merges are pairs in whichever form this version of the library writes."""
    model: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    return {"vocab": model["vocab"], "merges": merges}


def _normalize(text: str) -> str:
    return "".join(text.split()).casefold()


def _refuse(where: Path, reason: str) -> NoReturn:
    raise Refused(f"teacher: {where}: {reason} - take the tokenizer of the same model, or {FETCH_REMEDY}")
