from pathlib import Path

import torch

from shards.stats import Statistics
from stages.train import objective as statistics
from stages.train.losses import FeatureScale
from stages.train.objective import feature_scale


def test_the_scale_is_the_one_measured_from_all_states_at_once(monkeypatch) -> None:
    generator = torch.Generator().manual_seed(5)
    feature, s = torch.randn(50, 4, generator=generator) * torch.tensor([1, 1e-5, 3, 0.2]), torch.rand(50) * 0.7
    s[7] = 0.95  # a bin with one state, beside empty ones

    class Known:
        def statistics(self, bins: int) -> dict[str, Statistics]:
            return {"mid": Statistics.from_values(feature, (s * bins).long(), bins)}

    monkeypatch.setattr(statistics.Table, "open", lambda _folder: Known())
    found = feature_scale(Path("cache"), 10).deviations["mid"]
    torch.testing.assert_close(found, FeatureScale.measure({"mid": feature}, s, 10).deviations["mid"])
