"""A fitted David in a folder: its weights and the identity of its fit, which is verified on loading."""

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as tensors_of
from safetensors.torch import save as bytes_of
from torch import Tensor

from configs.values import Stored
from shards.manifest import Manifest, Recipe, differences, find_cache
from stages.david.assessor import FittedAssessor
from stages.david.block_model import BlockModel, FitConfig
from stages.david.fit import fit, fit_identity
from stages.david.trial import FitMetrics
from stages.system.atomic import atomic_write
from stages.system.refusal import Refused

DEFAULT_TEACHER_STEPS = 1000
"""Those of every fit before config.json recorded them, whatever the teacher had."""
WEIGHTS_FILE, META_FILE = "david.safetensors", "config.json"


class AssessorMeta(Stored):
    """The content of config.json."""

    identity: Recipe
    """what the weights depend on: cache, hook point, teacher, blocks, configuration of the fit"""
    fit: FitConfig
    steps: int = DEFAULT_TEACHER_STEPS
    """of the teacher"""
    sha256: str
    """of the weights file"""
    trials: Mapping[str, FitMetrics]


def load_or_fit(
    folder: Path, cache: Path, config: FitConfig, steps: int, blocks: Collection[str] | None = None
) -> FittedAssessor:
    """The David of a folder; fitted to the cache and saved there first where there is none yet.

    `steps` are those of the cache's teacher, `blocks` those of the student; none: all of the cache. Raises `Refused`
    when the one there was fitted to something else, or is damaged.
    """
    recipe = Manifest.open(find_cache(cache)).recipe
    if not (folder / META_FILE).is_file():
        david = fit(cache, config, steps, blocks=blocks)
        save(david, folder)
        return david
    david = load(folder, recipe, blocks)
    refuse_other_fit(david.identity, fit_identity(recipe, config, blocks), folder)
    if david.steps != steps:
        raise Refused(f"{folder}: David's bins are of {david.steps} steps, the teacher has {steps} - {_remedy(folder)}")
    return david


def save(assessor: FittedAssessor, folder: Path) -> None:
    """Write David into a folder; config.json comes last, with the hash of its weights."""
    content = bytes_of(
        {
            f"{block}.{name}": value.contiguous()
            for block in assessor.blocks
            for name, value in assessor.block_model(block).state_dict().items()
        }
    )
    sha256 = hashlib.sha256(content).hexdigest()
    facts = AssessorMeta(
        identity=assessor.identity,
        fit=assessor.config,
        steps=assessor.steps,
        sha256=sha256,
        trials=assessor.fit_metrics,
    )
    atomic_write(folder / WEIGHTS_FILE, content)
    atomic_write(folder / META_FILE, facts.model_dump_json(indent=1) + "\n")


def load(folder: Path, cache: Recipe, blocks: Collection[str] | None = None) -> FittedAssessor:
    """The David of a folder, for these blocks or all of the cache.

    Raises `Refused` when it was fitted to features of another cache, or is damaged.
    """
    path = folder / META_FILE
    try:
        facts = AssessorMeta.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise Refused(f"{path}: cannot be read ({str(error).splitlines()[0]}) - {_remedy(folder)}") from error
    identity = fit_identity(cache, facts.fit, blocks)
    refuse_other_fit(facts.identity, identity, folder)
    tensors = _read_tensors(folder, facts.sha256)
    widths: Any = identity.identity["blocks"]
    models = {block: _load_block_model(block, width, facts.fit, tensors, folder) for block, width in widths.items()}
    if tensors:
        raise Refused(f"{folder / WEIGHTS_FILE}: holds {min(tensors)}, which no block has - {_remedy(folder)}")
    return FittedAssessor(models, facts.identity, facts.fit, facts.trials, facts.steps)


def refuse_other_fit(fitted: Recipe, identity: Recipe, folder: Path) -> None:
    """Raise `Refused`, naming each field that differs, unless the fit's identity is this one."""
    if slips := differences(fitted, identity):
        raise Refused(f"{folder}: David was fitted to something else: {'; '.join(slips)} - {_remedy(folder)}")


def _read_tensors(folder: Path, sha256: str) -> dict[str, Tensor]:
    path = folder / WEIGHTS_FILE
    try:
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != sha256:
            raise Refused(f"{path}: not the weights that {META_FILE} names - {_remedy(folder)}")
        return tensors_of(content)
    except (OSError, SafetensorError) as error:
        raise Refused(f"{path}: cannot be read ({error}) - {_remedy(folder)}") from error


def _load_block_model(
    block: str, width: int, config: FitConfig, tensors: dict[str, Tensor], folder: Path
) -> BlockModel:
    """The network of a block, whose tensors are removed from `tensors`; each must be there, in its shape."""
    model = BlockModel(width, config.bins, config.patterns, config.dimensions)
    state = dict[str, Tensor]()
    for name, value in model.state_dict().items():
        tensor = tensors.pop(f"{block}.{name}", None)
        if tensor is None or tensor.shape != value.shape or tensor.dtype != value.dtype:
            expected = f"not {value.dtype} {list(value.shape)}"
            fault = "missing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}, {expected}"
            raise Refused(f"{folder / WEIGHTS_FILE}: {block}.{name}: {fault} - {_remedy(folder)}")
        state[name] = tensor
    model.load_state_dict(state)
    return model.requires_grad_(False).eval()


def _remedy(folder: Path) -> str:
    return f"remove {folder}, and David is fitted again"
