"""Many classes, each measured a few times: how much of a difference to believe.

Fay and Herriot (1979): y_c = theta_c + e_c with e_c ~ N(0, s_c^2), theta_c = x_c beta + u_c with u_c ~ N(0, tau^2).
The estimate is g_c y_c + (1 - g_c) x_c beta with g_c = tau^2 / (tau^2 + s_c^2): a class that was measured well keeps
its own mean, and where noise explains all differences (tau = 0) only what the covariates foretell is left of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

HALVINGS = 60
CLASSES_PER_COEFFICIENT = 5
"""Fewer classes than these for each coefficient, and a covariate would fit their noise."""


@dataclass(frozen=True)
class Means:
    """The mean of independent values in each of C classes, with its standard error."""

    mean: Float[Tensor, " C"]
    error: Float[Tensor, " C"]


@dataclass(frozen=True)
class Pooled(Means):
    """The estimates theta_c; `error` knows of the doubt about beta, not of the doubt about tau."""

    tau: float
    """Deviation of the classes about what the covariates foretell."""


def means(values: Sequence[Float[Tensor, " n"]]) -> Means:
    """The classes' means; their errors come from one deviation for all, since a few values tell their own one badly."""
    counts = torch.tensor([len(own) for own in values], dtype=torch.float64)
    mean = torch.stack([own.double().mean() for own in values])
    within = sum(float((own.double() - m).square().sum()) for own, m in zip(values, mean, strict=True))
    return Means(mean, (within / (counts.sum() - len(counts)) / counts).sqrt())


def pooled(measured: Means, covariates: Sequence[Float[Tensor, " C"]]) -> Pooled:
    """The estimates; of the covariates the first ones are used, as many as the number of classes allows."""
    y, variance = measured.mean.double(), measured.error.double().square()
    allowed = max(1, len(y) // CLASSES_PER_COEFFICIENT)
    columns = [torch.ones_like(y), *(column.double() - column.double().mean() for column in covariates)][:allowed]
    x = torch.stack(columns, dim=1)

    tau2 = _between(y, variance, x)
    beta, doubt = _fitted(y, variance + tau2, x)
    kept = tau2 / (tau2 + variance)
    mean = kept * y + (1 - kept) * (x @ beta)
    # Prasad and Rao (1990): the first two terms of the mean squared error.
    error = (kept * variance + (1 - kept).square() * ((x @ doubt) * x).sum(1)).sqrt()
    return Pooled(mean, error, float(tau2**0.5))


def _fitted(y: Tensor, variance: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """beta by weighted least squares, and its covariance."""
    doubt = torch.linalg.pinv(x.T @ (x / variance[:, None]), hermitian=True)
    return doubt @ (x.T @ (y / variance)), doubt


def _between(y: Tensor, variance: Tensor, x: Tensor) -> float:
    """tau^2, at which the weighted squares about the fit are as many as there are degrees of freedom; 0 if never."""
    freedom = len(y) - x.shape[1]

    def surplus(tau2: float) -> float:
        beta, _ = _fitted(y, variance + tau2, x)
        return float(((y - x @ beta).square() / (variance + tau2)).sum()) - freedom

    if freedom <= 0 or surplus(0.0) <= 0:
        return 0.0
    low, high = 0.0, float((y - y.mean()).square().sum())  # every square over the largest: at most one in sum
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if surplus(middle) > 0 else (low, middle)
    return (low + high) / 2
