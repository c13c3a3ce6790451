"""Sets of pictures as columns of one table: their distances to the teacher's pictures, CLIP's score, the scorer's."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from configs.values import PictureSize
from stages.evaluate.clip import ClipScorer
from stages.evaluate.distances.estimators import frechet_floor, kernel_distance, kernel_floor
from stages.evaluate.distances.features import FeatureSpace, open_features
from stages.evaluate.metrics import Scorer
from stages.system.refusal import Refused

SUBSETS, SUBSET_SIZE = 100, 1000
"""Of the KID of sets whose pictures are no pairs, as it was published (Binkowski et al. 2018)."""
LIMIT = 0.95
"""Quantile of a floor that a model like the reference passes once in twenty times."""


@dataclass(frozen=True)
class Band:
    """The distances of two sets of one model: their mean, and the limit below which 95 % of them lie."""

    mean: float
    limit: float


@dataclass(frozen=True)
class Floor:
    """The distances between two sets of the teacher's own pictures, as many as these."""

    pictures: int
    frechet: Band
    kid: Band


@dataclass(frozen=True)
class Column:
    """The figures of one set of pictures; None where they were not measured."""

    pictures: int
    steps: int | None = None
    frechet: float | None = None
    kid: float | None = None
    clip: float | None = None
    """Mean cosine of picture and sentence."""
    floor: Floor | None = None
    """Where the set has fewer pictures than the others: the floor of as many."""


@dataclass(frozen=True)
class Distances:
    """Columns by model, each at several numbers of steps; a folder's pictures are a single column."""

    features: str | None
    dimensions: int | None
    reference: str
    """What the distances are measured to."""
    floor: Floor | None
    columns: Mapping[str, Sequence[Column]]
    prompts: Sequence[str] = ()


@dataclass(frozen=True)
class PictureSet:
    """What was read off some pictures, row by row."""

    count: int
    features: Float[Tensor, "n d"] | None = None
    cosines: Float[Tensor, " n"] | None = None
    scores: Mapping[str, Float[Tensor, " n"]] = field(default_factory=dict)

    @property
    def mean_cosine(self) -> float | None:
        """CLIP's score of the set."""
        return None if self.cosines is None else float(self.cosines.mean())

    def in_units(self, unit: float) -> "PictureSet":
        """The same with features in units of `unit`."""
        return self if self.features is None else replace(self, features=self.features / unit)

    def rows(self, rows: Sequence[int]) -> "PictureSet":
        """Some of the rows."""
        index = torch.tensor(rows, dtype=torch.long)
        return PictureSet(
            len(rows),
            None if self.features is None else self.features[index],
            None if self.cosines is None else self.cosines[index],
            {name: value[index] for name, value in self.scores.items()},
        )


@dataclass(frozen=True)
class Measures:
    """What is read off pictures; what is None is left out."""

    features: FeatureSpace | None = None
    clip: Scorer | None = None
    scorer: Scorer | None = None

    def read(self, texts: Sequence[str], batches: Iterable[Float[Tensor, "b 3 h w"]]) -> PictureSet:
        """The readings of pictures in [0, 1], batch after batch, row i of the sentence i."""
        features, cosines, scores, count = list[Tensor](), list[Tensor](), list[Mapping[str, Tensor]](), 0
        for pictures in batches:
            of_batch = texts[count : count + len(pictures)]
            count += len(pictures)
            if self.features:
                features.append(self.features(pictures))
            if self.clip:
                cosines.append(self.clip(of_batch, pictures)["clip"].double())
            if self.scorer:
                scores.append(self.scorer(of_batch, pictures))
        return PictureSet(
            count,
            torch.cat(features) if features else None,
            torch.cat(cosines) if cosines else None,
            {name: torch.cat([one[name] for one in scores]) for name in scores[0]} if scores else {},
        )


def open_measures(
    features: str | None, clip: str | None, scorer: Scorer | None, size: PictureSize, device: torch.device
) -> Measures:
    """What the user names; raises `Refused` for what cannot be used on pictures of this size."""
    return Measures(
        open_features(features, size, device) if features else None,
        ClipScorer(clip, device) if clip else None,
        scorer,
    )


def make_column(
    pictures: PictureSet, reference: PictureSet, steps: int | None = None, floor: Floor | None = None
) -> Column:
    """The figures of a set whose row i is of the sentence of the reference's row i, features in units of `unit_of`.

    The Frechet distance is a share of the reference's total variance; the KID leaves out the pairs of one sentence.
    """
    frechet = kid = None
    if pictures.features is not None and reference.features is not None:
        frechet = frechet_by_torchmetrics(pictures.features, reference.features) / reference.features.shape[1]
        kid = kernel_distance(pictures.features, reference.features)
    return Column(pictures.count, steps, frechet, kid, pictures.mean_cosine, floor)


def published_column(pictures: PictureSet, reference: PictureSet, steps: int | None = None) -> Column:
    """The figures as they are published: features as they are, and the KID of random subsets."""
    frechet = kid = None
    if pictures.features is not None and reference.features is not None:
        frechet = frechet_by_torchmetrics(pictures.features, reference.features)
        size = min(SUBSET_SIZE, pictures.count, reference.count)
        kid = kernel_by_torchmetrics(pictures.features, reference.features, size)
    return Column(pictures.count, steps, frechet, kid, pictures.mean_cosine)


def make_floor(own: PictureSet, other: PictureSet) -> Floor | None:
    """The floor of `make_column` from two sets of one model; None without features."""
    if own.features is None or other.features is None:
        return None
    frechet = frechet_floor(own.features, other.features) / own.features.shape[1]
    bands = [
        Band(float(one.mean()), float(one.quantile(LIMIT)))
        for one in (frechet, kernel_floor(own.features, other.features))
    ]
    return Floor(own.count, *bands)


def unit_of(reference: PictureSet, name: str) -> float:
    """The root mean variance of a set's features; raises `Refused` where all its pictures have the same."""
    if reference.features is None:
        return 1.0
    unit = float(reference.features.var(0).mean().sqrt())
    if not unit > 0:
        raise Refused(f"features: {name}: are the same for every picture of the teacher - name others")
    return unit


class _Rows(nn.Module):
    """A feature module of rows that are features already, as torchmetrics takes it."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """The rows."""
        return rows


def frechet_by_torchmetrics(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> float:
    """The Frechet distance of torchmetrics, in float64."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_Rows(x.shape[1]), normalize=True)
    metric.update(y.double(), real=True)
    metric.update(x.double(), real=False)
    return float(metric.compute())


def kernel_by_torchmetrics(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"], subset_size: int) -> float:
    """The KID of torchmetrics, in float64: the mean of random subsets, or of all rows where there are no more."""
    from torchmetrics.image.kid import KernelInceptionDistance

    subsets = 1 if subset_size == len(x) == len(y) else SUBSETS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it keeps all features in memory, which is meant
        metric = KernelInceptionDistance(_Rows(x.shape[1]), subsets, subset_size, normalize=True)
    metric.update(y.double(), real=True)
    metric.update(x.double(), real=False)
    with torch.random.fork_rng(devices=[]):  # it draws its subsets from torch's own generator
        torch.manual_seed(0)
        return float(metric.compute()[0])
