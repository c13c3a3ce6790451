"""Fits David to the teacher's own features: minutes on one thread of a CPU, the same numbers every time."""

import math
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from shards.manifest import Manifest, Recipe, find_cache
from shards.table import Table
from stages.david.assessment import Posterior, soft_targets
from stages.david.assessor import FittedAssessor
from stages.david.block_model import BlockModel, FitConfig, PentachoronClassifier
from stages.david.geometry import cayley_menger_volume, edge_lengths
from stages.david.patterns import BlockStates, PatternSpace, split_rows
from stages.david.trial import TABLE_HEADER, FitMetrics, add_noise, evaluate_fit, tune
from stages.system.device import one_thread
from stages.system.forecast import Forecast
from stages.system.refusal import Refused

IDENTITY_FIELDS = ("hook_point", "teacher", "blocks")
DEVIATION_FLOOR = 0.01
"""Of the block's mean deviation: a nearly constant channel would outweigh all others."""
MAX_CLUSTERED_STATES = 10_000
"""States clustered into patterns: more move no centre, and their covariance would dominate the fit's time."""
MIN_VOLUME = 1e-3
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.02, 1.0
WARMUP_STEPS = 20
WEIGHT_DECAY = 1e-4


def fit(
    folder: Path,
    config: FitConfig,
    steps: int,
    print_line: Callable[[str], None] = print,
    blocks: Collection[str] | None = None,
) -> FittedAssessor:
    """David, fitted to each block, or these, of a cache or run folder; prints its metrics on the validation prompts.

    `steps` are those of the cache's teacher. Raises `Refused` for more bins than that.
    """
    if config.bins > steps:
        raise Refused(f"david.fit.bins = {config.bins}: the teacher has {steps} steps - take as many bins or fewer")
    table, cache = Table.open(folder), Manifest.open(find_cache(folder)).recipe
    identity = fit_identity(cache, config, blocks)
    names: Any = identity.identity["blocks"]
    chosen = [block for block in table.blocks if block in names]
    rows = split_rows(table, config.held_out, config.most_states, config.seed)
    models: dict[str, BlockModel] = {}
    metrics: dict[str, FitMetrics] = {}
    print_line(
        f"david: {len(rows.training)} states for training, {len(rows.tuning)} for tuning, {len(rows.validation)} for "
        f"validation\n{TABLE_HEADER}"
    )
    forecast = Forecast("david", "steps of the fit", len(chosen) * config.steps, print_line)
    for number, block in enumerate(chosen):
        begun = time.perf_counter()
        training, tuning, validation = (
            BlockStates.from_table(table, block, part, config.bins, steps)
            for part in (rows.training, rows.tuning, rows.validation)
        )
        with one_thread():
            models[block], space = fit_block(training, config, forecast, number * config.steps)
            tune(models[block], tuning, space, config.seed)
            metrics[block] = evaluate_fit(models[block], validation, space, config.seed)
        print_line(metrics[block].table_row(block, time.perf_counter() - begun))
    return FittedAssessor(models, identity, config, metrics, steps)


def fit_identity(cache: Recipe, config: FitConfig, blocks: Collection[str] | None = None) -> Recipe:
    """What a fit depends on: the cache, its hook point, teacher and blocks, or these of them, and the configuration.

    Raises `Refused` when the cache's recipe lacks one of these.
    """
    for name in IDENTITY_FIELDS:
        if name not in cache.identity:
            raise Refused(f"cache: its recipe has no {name}, which a fit depends on - make the cache again")
    facts: dict[str, Any] = {name: cache.identity[name] for name in IDENTITY_FIELDS}
    if blocks is not None:
        facts["blocks"] = {block: width for block, width in facts["blocks"].items() if block in blocks}
    return Recipe(identity={**facts, "cache": cache.fingerprint(), "fit": config.model_dump(mode="json")})


def fit_block(
    states: BlockStates, config: FitConfig, forecast: Forecast | None = None, previous_steps: int = 0
) -> tuple[BlockModel, PatternSpace]:
    """A block model fitted to these states' bins and patterns, and the patterns; the forecast counts the steps."""
    generator = torch.Generator().manual_seed(config.seed)
    width = states.features.shape[1]
    model = BlockModel(width, config.bins, config.patterns, config.dimensions, generator)
    set_standardisation(model, states.features)
    features = model.standardise(states.features)
    subset = torch.randperm(len(features), generator=generator)[:MAX_CLUSTERED_STATES]
    space = PatternSpace.fit(features[subset], states.s[subset], config.patterns, generator)
    labels = space.label(features, states.s)

    targets = soft_targets(torch.arange(config.bins), config.bins)
    linear = [*model.widen.parameters(), *model.narrow.parameters()]
    crystals = [*model.bins.parameters(), *model.patterns.parameters()]
    groups = [{"params": linear, "weight_decay": WEIGHT_DECAY}, {"params": crystals, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate)
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * learning_rate_factor(step, config.steps)
        rows = torch.randint(len(labels), (config.batch_size,), generator=generator)
        bins = states.bins[rows]
        optimizer.zero_grad()
        noisy = augment_with_noise(model, states.features[rows], config.noise, generator)
        fit_loss(model, noisy, bins, labels[rows], targets[bins]).backward()
        optimizer.step()
        clamp_temperatures(model)
        if forecast:
            forecast.progress(previous_steps + step + 1)
    return model.requires_grad_(False).eval(), space


def augment_with_noise(
    block_model: BlockModel, features: Float[Tensor, "b n"], max_noise: float, generator: torch.Generator
) -> Float[Tensor, "b n"]:
    """Half of the features under noise of 0 to `max_noise` deviations.

    The teacher's channels are correlated, and the directions in which they hardly vary predict the time well; a model
    fitted without noise relies on them, and then the smallest error of a student looks as large as any other.
    """
    level = max_noise * (2 * torch.rand(len(features), 1, generator=generator) - 1).clamp_min(0)
    return add_noise(block_model, features, level, generator)


def set_standardisation(block_model: BlockModel, features: Float[Tensor, "m n"]) -> None:
    """Set the mean and deviation of each channel."""
    deviation = features.std(dim=0)
    block_model.mean.copy_(features.mean(dim=0))
    block_model.deviation.copy_(deviation.clamp_min(max(DEVIATION_FLOOR * float(deviation.mean()), 1e-6)))


def fit_loss(
    block_model: BlockModel,
    features: Float[Tensor, "b n"],
    bins: Int[Tensor, " b"],
    labels: Int[Tensor, " b"],
    targets: Float[Tensor, "b T"],
) -> Float[Tensor, ""]:
    """Cross-entropies of both posteriors, inclusion in the true bin's pentachoron, and the pentachora's shape.

    L = CE(q, bins) + 1/2 CE(label, patterns) - 1/10 mean log c + 1/20 mean (deviation / mean of the ten edges)
        + mean relu(1e-3 - volume)
    """
    posterior: Posterior = block_model(features, bins)
    loss = -(targets * posterior.log_bins).sum(dim=1).mean()
    loss = loss + F.nll_loss(posterior.log_patterns, labels) / 2 - posterior.inclusion.log().mean() / 10
    return loss + shape_penalty(block_model.bins) + shape_penalty(block_model.patterns)


def shape_penalty(classifier: PentachoronClassifier) -> Float[Tensor, ""]:
    """Unevenness of the edges of the pentachora, and flatness of those that are all but flat."""
    vertices = classifier.unit_vertices()
    lengths = edge_lengths(vertices)
    uneven = (lengths.std(dim=-1) / lengths.mean(dim=-1)).mean()
    return uneven / 20 + F.relu(MIN_VOLUME - cayley_menger_volume(vertices)).mean().float()


def learning_rate_factor(step: int, steps: int) -> float:
    """A short linear warm-up, then half a cosine down to 0."""
    return min((step + 1) / WARMUP_STEPS, 1.0) * (1 + math.cos(math.pi * step / steps)) / 2


def clamp_temperatures(block_model: BlockModel) -> None:
    """Keep both posteriors from collapsing to a spike or to uniform."""
    with torch.no_grad():
        block_model.bins.temperature.clamp_(MIN_TEMPERATURE, MAX_TEMPERATURE)
        block_model.patterns.temperature.clamp_(MIN_TEMPERATURE, MAX_TEMPERATURE)
