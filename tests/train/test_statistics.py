from pathlib import Path

import torch
from torch import Tensor

from shards.stats import Statistics
from stages.flow.timesteps import bin_of_time
from stages.train import objective
from stages.train.losses import DEVIATION_FLOOR

BINS = 10


def expected_deviations(feature: Tensor, s: Tensor) -> Tensor:
    """The standard deviations in each bin of s, from all states at once."""
    overall = feature.std(dim=0)
    members = [feature[bin_of_time(s, BINS) == i] for i in range(BINS)]
    by_bin = torch.stack([rows.std(dim=0) if len(rows) > 1 else overall for rows in members])
    return by_bin.clamp_min(DEVIATION_FLOOR * float(overall.mean()))


def test_feature_scale_equals_the_deviations_of_all_states_at_once(monkeypatch) -> None:
    generator = torch.Generator().manual_seed(5)
    feature, s = torch.randn(50, 4, generator=generator) * torch.tensor([1, 1e-5, 3, 0.2]), torch.rand(50) * 0.7
    s[7] = 0.95  # a bin with one state, beside empty ones

    class FixedTable:
        def statistics(self, bins: int) -> dict[str, Statistics]:
            return {"mid": Statistics.from_values(feature, (s * bins).long(), bins)}

    monkeypatch.setattr(objective.Table, "open", lambda _folder: FixedTable())
    deviations = objective.feature_scale(Path("cache"), BINS).deviations["mid"]
    torch.testing.assert_close(deviations, expected_deviations(feature, s))
