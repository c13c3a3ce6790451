"""Distances between two sets of samples of the same prompts, and how far two sets of one model lie apart (the floor).

Frechet distances equal torchmetrics 1.9.0; its KID compares also the two samples of one prompt, ours does not.

Row i of both sets belongs to prompt i. Under the hypothesis that both come from one model, the two samples of a prompt
can change places: the floor is the distance after random such swaps of two sets of the teacher's from different noises.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

SWAPS = 500


def frechet_distance(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> float:
    """|mean x - mean y|^2 + tr(X + Y - 2 (X Y)^(1/2)) of the covariances X and Y (Heusel et al. 2017).

    It is biased upwards by the number of samples, so that only distances of as many can be compared.
    """
    x, y = x.double(), y.double()
    squares = (x.mean(0) - y.mean(0)).square().sum()
    return float(squares + x.var(0).sum() + y.var(0).sum() - 2 * _cross_trace(x, y))


def _cross_trace(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> Float[Tensor, ""]:
    """tr (X Y)^(1/2) of the covariances of float64 rows."""
    if len(x) < x.shape[1] and len(y) < y.shape[1]:
        # X = A^T A, Y = B^T B of the centred, scaled rows: the sum of the singular values of A B^T, which is smaller.
        a, b = ((one - one.mean(0)) / (len(one) - 1) ** 0.5 for one in (x, y))
        singular: Tensor = torch.linalg.svdvals(a @ b.T)
        return singular.sum()
    root = _symmetric_root(x.T.cov())
    # tr (X Y)^(1/2) is that of (X^(1/2) Y X^(1/2))^(1/2), which is symmetric.
    return _symmetric_root(root @ y.T.cov() @ root).trace()


def kernel_terms(x: Float[Tensor, "n d"], y: Float[Tensor, "n d"]) -> Float[Tensor, "n n"]:
    """h_ij = k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(y_i, x_j), zero for i = j, with KID's k = (x y / d + 1)^3."""
    both = torch.cat([x, y]).double()
    kernel = (both @ both.T / both.shape[1] + 1) ** 3
    (xx, xy), (yx, yy) = (half.chunk(2, dim=1) for half in kernel.chunk(2))
    return (xx + yy - xy - yx).fill_diagonal_(0)


def kernel_distance(x: Float[Tensor, "n d"], y: Float[Tensor, "n d"]) -> float:
    """KID (Binkowski et al. 2018): the squared maximum mean discrepancy, which is 0 on average where x is as y.

    The estimator of Gretton et al. (2012, lemma 6) leaves out pairs of one row, because these share a prompt.
    """
    n = len(x)
    return float(kernel_terms(x, y).sum() / (n * (n - 1)))


def frechet_floor(x: Float[Tensor, "n d"], y: Float[Tensor, "n d"], swaps: int = SWAPS) -> Float[Tensor, " swaps"]:
    """The Frechet distances after random swaps."""
    keep = (_signs(swaps, len(x)) > 0)[..., None]
    return torch.tensor([frechet_distance(torch.where(k, x, y), torch.where(k, y, x)) for k in keep])


def kernel_floor(x: Float[Tensor, "n d"], y: Float[Tensor, "n d"], swaps: int = SWAPS) -> Float[Tensor, " swaps"]:
    """The KIDs after random swaps: swapping row i changes the sign of h_ij for every j."""
    signs, n = _signs(swaps, len(x)).double(), len(x)
    return ((signs @ kernel_terms(x, y)) * signs).sum(1) / (n * (n - 1))


def total_variation(difference: Float[Tensor, "... k"]) -> Float[Tensor, "..."]:
    """Half of the absolute sum: of the difference of two distributions over k answers, from 0 to 1."""
    return difference.abs().sum(-1) / 2


def answer_differences(
    x: Int[Tensor, "prompts noises"], y: Int[Tensor, "prompts noises"], answers: int
) -> Float[Tensor, "prompts noises k"]:
    """One-hot x minus one-hot y, whose means are differences of distributions."""
    one_hot: Callable[[Tensor, int], Tensor] = torch.nn.functional.one_hot
    return (one_hot(x, answers) - one_hot(y, answers)).double()


def pooled_variation(differences: Float[Tensor, "... prompts noises k"]) -> Float[Tensor, "..."]:
    """The total variation of the answers to all prompts together."""
    return total_variation(differences.mean((-3, -2)))


def prompt_variation(differences: Float[Tensor, "... prompts noises k"]) -> Float[Tensor, "..."]:
    """The mean total variation of the answers to one prompt."""
    return total_variation(differences.mean(-2)).mean(-1)


def variation_floor(
    differences: Float[Tensor, "prompts noises k"], measure: Callable[[Tensor], Tensor], swaps: int = SWAPS
) -> Float[Tensor, " swaps"]:
    """`measure` after random swaps of the answers to the same prompt."""
    prompts, noises, _ = differences.shape
    signs = _signs(swaps, prompts * noises).double().view(swaps, prompts, noises, 1)
    return torch.stack([measure(differences * one) for one in signs])


def _signs(swaps: int, rows: int) -> Int[Tensor, "swaps rows"]:
    """1 where a row stays and -1 where it is swapped; the same at every call."""
    return torch.randint(0, 2, (swaps, rows), generator=torch.Generator().manual_seed(0)) * 2 - 1


def _symmetric_root(matrix: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    return root
