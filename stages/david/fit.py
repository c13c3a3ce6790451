"""Fits David to the teacher's own features: minutes on one thread of a CPU, the same numbers every time."""

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from configs.refusal import Refused
from shards.manifest import Manifest, find_cache
from shards.recipe import Recipe
from shards.table import Table
from stages.david.assessment import Posterior, soft_targets
from stages.david.assessor import Fitted
from stages.david.companion import Companion, Crystals, FitConfig
from stages.david.geometry import cayley_menger_volume, edges
from stages.david.patterns import PatternSpace
from stages.david.states import States, split_rows
from stages.david.trial import HEADING, Trial, try_out
from stages.david.tuning import tune
from stages.forecast import Forecast
from stages.threads import one_thread

BELONGS = ("hook_point", "teacher", "blocks")
DEVIATION_FLOOR = 0.01
"""Of the block's mean deviation: a channel that hardly moves would outweigh all others."""
MOST_CLUSTERED = 10_000
"""States that decide the patterns: more move no centre, and their covariance would take longer than all else."""
LEAST_VOLUME = 1e-3
SHARPEST, BLUNTEST = 0.02, 1.0
WARM_UP = 20
WEIGHT_DECAY = 1e-4


def fit(folder: Path, config: FitConfig, steps: int, say: Callable[[str], None] = print) -> Fitted:
    """David, fitted to each block of a cache or run folder, tried on its validation prompts; tells how he did.

    `steps` is how many the cache's teacher has. Raises `Refused` for more bins than that.
    """
    if config.bins > steps:
        raise Refused(f"david.fit.bins = {config.bins}: the teacher has {steps} steps - take as many bins or fewer")
    table, cache = Table.open(folder), Manifest.open(find_cache(folder)).recipe
    rows = split_rows(table, config.held_out, config.most_states, config.seed)
    companions: dict[str, Companion] = {}
    trials: dict[str, Trial] = {}
    say(f"david: {len(rows.teaching)} states teach, {len(rows.tuning)} tune, {len(rows.judging)} judge\n{HEADING}")
    forecast = Forecast("david", "steps of the fit", len(table.blocks) * config.steps, say)
    for number, block in enumerate(table.blocks):
        begun = time.perf_counter()
        teaching, tuning, judging = (
            States.of(table, block, part, config.bins, steps) for part in (rows.teaching, rows.tuning, rows.judging)
        )
        with one_thread():
            companion, space = fit_block(teaching, config, forecast, number * config.steps)
            tune(companion, tuning, space, config.seed)
            trials[block] = try_out(companion, judging, space, config.seed)
        companions[block] = companion
        say(trials[block].line(block, time.perf_counter() - begun))
    return Fitted(companions, identity_of(cache, config), config, trials, steps)


def identity_of(cache: Recipe, config: FitConfig) -> Recipe:
    """What decides a fit: the cache, what its recipe says of its features, and the fit's configuration.

    Raises `Refused` when the recipe does not say where its features were taken.
    """
    for name in BELONGS:
        if name not in cache.identity:
            raise Refused(f"cache: its recipe has no {name}, so David cannot tell what he sees - make the cache again")
    said = {name: cache.identity[name] for name in BELONGS}
    return Recipe(identity={**said, "cache": cache.fingerprint(), "fit": config.model_dump(mode="json")})


def fit_block(
    states: States, config: FitConfig, forecast: Forecast | None = None, steps_before: int = 0
) -> tuple[Companion, PatternSpace]:
    """A companion that tells these states' bins and patterns, and the patterns; the forecast counts the steps."""
    generator = torch.Generator().manual_seed(config.seed)
    width = states.features.shape[1]
    companion = Companion(width, config.bins, config.patterns, config.dimensions, generator)
    standardise_by(companion, states.features)
    features = companion.standardise(states.features)
    some = torch.randperm(len(features), generator=generator)[:MOST_CLUSTERED]
    space = PatternSpace.fit(features[some], states.s[some], config.patterns, generator)
    labels = space.label(features, states.s)

    targets = soft_targets(torch.arange(config.bins), config.bins)
    linear = [*companion.widen.parameters(), *companion.narrow.parameters()]
    crystals = [*companion.bins.parameters(), *companion.patterns.parameters()]
    groups = [{"params": linear, "weight_decay": WEIGHT_DECAY}, {"params": crystals, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate)
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * schedule(step, config.steps)
        rows = torch.randint(len(labels), (config.batch_size,), generator=generator)
        bins = states.bins[rows]
        optimizer.zero_grad()
        seen = blurred(companion, states.features[rows], config.noise, generator)
        loss(companion, seen, bins, labels[rows], targets[bins]).backward()
        optimizer.step()
        hold_temperatures(companion)
        if forecast:
            forecast.progress(steps_before + step + 1)
    return companion.requires_grad_(False).eval(), space


def blurred(
    companion: Companion, features: Float[Tensor, "b n"], most: float, generator: torch.Generator
) -> Float[Tensor, "b n"]:
    """Half of the features under noise of 0 to `most` deviations.

    The teacher's channels are correlated, and the directions in which they hardly vary tell the time well; a companion
    that never saw noise relies on them, and the least error of a student is as bad to him as any other.
    """
    size = most * (2 * torch.rand(len(features), 1, generator=generator) - 1).clamp_min(0)
    return features + size * companion.deviation * torch.randn(features.shape, generator=generator)


def standardise_by(companion: Companion, features: Float[Tensor, "m n"]) -> None:
    """Give a companion the mean and deviation of each channel."""
    deviation = features.std(dim=0)
    companion.mean.copy_(features.mean(dim=0))
    companion.deviation.copy_(deviation.clamp_min(max(DEVIATION_FLOOR * float(deviation.mean()), 1e-6)))


def loss(
    companion: Companion,
    features: Float[Tensor, "b n"],
    bins: Int[Tensor, " b"],
    labels: Int[Tensor, " b"],
    targets: Float[Tensor, "b T"],
) -> Float[Tensor, ""]:
    """Cross-entropies of both posteriors, the inclusion in the true bin's pentachoron, and the pentachora's own shape.

    L = CE(q, bins) + 1/2 CE(label, patterns) - 1/10 mean log c + 1/20 mean (deviation / mean of the ten edges)
        + mean relu(1e-3 - volume)
    """
    said: Posterior = companion(features, bins)
    of_bins = -(targets * said.log_bins).sum(dim=1).mean()
    of_patterns = F.nll_loss(said.log_patterns, labels)
    within = -said.inclusion.log().mean()
    return of_bins + of_patterns / 2 + within / 10 + shape(companion.bins) + shape(companion.patterns)


def shape(crystals: Crystals) -> Float[Tensor, ""]:
    """How uneven the edges of the pentachora are, and how flat those that are all but flat."""
    vertices = crystals.unit()
    lengths = edges(vertices)
    uneven = (lengths.std(dim=-1) / lengths.mean(dim=-1)).mean()
    return uneven / 20 + F.relu(LEAST_VOLUME - cayley_menger_volume(vertices)).mean().float()


def schedule(step: int, steps: int) -> float:
    """A short straight rise, then half a cosine down to 0."""
    return min((step + 1) / WARM_UP, 1.0) * (1 + math.cos(math.pi * step / steps)) / 2


def hold_temperatures(companion: Companion) -> None:
    """Keep both temperatures where a posterior is neither one spike nor flat."""
    with torch.no_grad():
        companion.bins.temperature.clamp_(SHARPEST, BLUNTEST)
        companion.patterns.temperature.clamp_(SHARPEST, BLUNTEST)
