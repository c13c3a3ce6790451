"""A fitted David in a folder: weights, and what they belong to; one fitted to other features is not handed out."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as tensors_of
from safetensors.torch import save as bytes_of
from torch import Tensor

from configs.atomic import atomic_write
from configs.refusal import Refused
from configs.strict import Stored
from shards.manifest import Manifest, find_cache
from shards.recipe import Recipe, differences
from stages.david.assessor import Fitted
from stages.david.companion import Companion, FitConfig
from stages.david.fit import fit, identity_of
from stages.david.trial import Trial

STEPS_BEFORE = 1000
"""What every David was fitted with, whatever his teacher had, before config.json told it."""
WEIGHTS, FACTS = "david.safetensors", "config.json"


class Facts(Stored):
    """The content of config.json."""

    identity: Recipe
    """what decides the weights: cache, hook point, teacher, blocks, configuration of the fit"""
    fit: FitConfig
    steps: int = STEPS_BEFORE
    """of the teacher"""
    sha256: str
    """of the weights' file"""
    trials: Mapping[str, Trial]


def ready(folder: Path, cache: Path, config: FitConfig, steps: int) -> Fitted:
    """The David of a folder, who is fitted to the cache and saved there first where none lies yet.

    `steps` is how many the cache's teacher has.
    """
    david, is_new = opened(folder, cache, config, steps)
    if is_new:
        save(david, folder)
    return david


def opened(folder: Path, cache: Path, config: FitConfig, steps: int) -> tuple[Fitted, bool]:
    """The David of a folder, and whether none lies there yet: then he is fitted to the cache, and nothing is written.

    Raises `Refused` when the one that lies there was fitted to something else, or is damaged.
    """
    recipe = Manifest.open(find_cache(cache)).recipe
    if not (folder / FACTS).is_file():
        return fit(cache, config, steps), True
    david = load(folder, recipe)
    refuse_another(david, identity_of(recipe, config), folder)
    if david.steps != steps:
        raise Refused(
            f"{folder}: David's bins are of {david.steps} steps, the teacher has {steps} - {_way_out(folder)}"
        )
    return david, False


def save(david: Fitted, folder: Path) -> None:
    """Write David into a folder; config.json comes last and says which weights it means."""
    content = bytes_of(
        {
            f"{block}.{name}": value.contiguous()
            for block in david.blocks
            for name, value in david.companion(block).state_dict().items()
        }
    )
    sha256 = hashlib.sha256(content).hexdigest()
    facts = Facts(identity=david.identity, fit=david.config, steps=david.steps, sha256=sha256, trials=david.trials)
    atomic_write(folder / WEIGHTS, content)
    atomic_write(folder / FACTS, facts.model_dump_json(indent=1) + "\n")


def load(folder: Path, cache: Recipe) -> Fitted:
    """The David of a folder; raises `Refused` when he was fitted to other features than this cache's, or is damaged."""
    path = folder / FACTS
    try:
        facts = Facts.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise Refused(f"{path}: cannot be read ({str(error).splitlines()[0]}) - {_way_out(folder)}") from error
    david = Fitted({}, facts.identity, facts.fit, facts.trials, facts.steps)
    refuse_another(david, identity_of(cache, facts.fit), folder)
    tensors = _tensors(folder, facts.sha256)
    widths: Any = cache.identity["blocks"]
    companions = {block: _companion(block, width, facts.fit, tensors, folder) for block, width in widths.items()}
    if tensors:
        raise Refused(f"{folder / WEIGHTS}: holds {min(tensors)}, which no block has - {_way_out(folder)}")
    return Fitted(companions, facts.identity, facts.fit, facts.trials, facts.steps)


def refuse_another(david: Fitted, identity: Recipe, folder: Path) -> None:
    """Raise `Refused`, naming each field that differs, unless David was fitted as `identity` says."""
    if slips := differences(david.identity, identity):
        raise Refused(f"{folder}: David was fitted to something else: {'; '.join(slips)} - {_way_out(folder)}")


def _tensors(folder: Path, sha256: str) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    try:
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != sha256:
            raise Refused(f"{path}: not the weights that {FACTS} means - {_way_out(folder)}")
        return tensors_of(content)
    except (OSError, SafetensorError) as error:
        raise Refused(f"{path}: cannot be read ({error}) - {_way_out(folder)}") from error


def _companion(block: str, width: int, config: FitConfig, tensors: dict[str, Tensor], folder: Path) -> Companion:
    """The network of a block, whose tensors are taken out of `tensors`; each must be there, in its shape."""
    companion = Companion(width, config.bins, config.patterns, config.dimensions)
    expected, found = companion.state_dict(), dict[str, Tensor]()
    for name, value in expected.items():
        one = tensors.pop(f"{block}.{name}", None)
        if one is None or one.shape != value.shape or one.dtype != value.dtype:
            was = "missing" if one is None else f"{one.dtype} {list(one.shape)}, not {value.dtype} {list(value.shape)}"
            raise Refused(f"{folder / WEIGHTS}: {block}.{name}: {was} - {_way_out(folder)}")
        found[name] = one
    companion.load_state_dict(found)
    return companion.requires_grad_(False).eval()


def _way_out(folder: Path) -> str:
    return f"remove {folder} and he is fitted again"
