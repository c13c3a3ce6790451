"""Mean and deviation of channels, gathered piece by piece without losing digits."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Statistics:
    """What is known of the n channels of a block, apart for each bin; all in float64."""

    count: Float[Tensor, "bins 1"]
    mean: Float[Tensor, "bins n"]
    square: Float[Tensor, "bins n"]
    """sum of squared distances from the mean"""

    @classmethod
    def none(cls, bins: int, n: int) -> "Statistics":
        """What is known before the first row."""
        zeros = torch.zeros(bins, n, dtype=torch.float64)
        return cls(zeros[:, :1], zeros, zeros)

    @classmethod
    def of(cls, values: Float[Tensor, "m n"], bin_of_row: Int[Tensor, " m"], bins: int) -> "Statistics":
        """What these rows say."""
        empty = cls.none(bins, values.shape[1])
        values = values.double()
        count = empty.count.index_add(0, bin_of_row, torch.ones(len(values), 1, dtype=torch.float64))
        mean = empty.mean.index_add(0, bin_of_row, values) / count.clamp_min(1)
        return cls(count, mean, empty.square.index_add(0, bin_of_row, (values - mean[bin_of_row]).square()))

    def joined(self, other: "Statistics") -> "Statistics":
        """What both say together (Chan, Golub and LeVeque's update)."""
        count = self.count + other.count
        share = other.count / count.clamp_min(1)
        apart = other.mean - self.mean
        square = self.square + other.square + apart.square() * self.count * share
        return Statistics(count, self.mean + apart * share, square)

    def overall(self) -> "Statistics":
        """The same rows in a single bin."""
        each = [
            Statistics(self.count[i : i + 1], self.mean[i : i + 1], self.square[i : i + 1])
            for i in range(len(self.count))
        ]
        found = each[0]
        for one in each[1:]:
            found = found.joined(one)
        return found

    def std(self, correction: int = 1) -> Float[Tensor, "bins n"]:
        """Standard deviations, 0 where there are too few rows for one."""
        return (self.square / (self.count - correction).clamp_min(1)).sqrt()
