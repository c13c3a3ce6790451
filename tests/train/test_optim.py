import pytest

from stages.train.optim import OptimizerConfig, learning_rate

CONFIG = OptimizerConfig(learning_rate=2.0, warmup_samples=100, final_share=0.1)


@pytest.mark.parametrize(
    ("samples", "rate"),
    [(0, 0.0), (50, 1.0), (100, 2.0), (600, 2.0 * 0.55), (1100, 0.2), (5000, 0.2)],
)
def test_the_rate_rises_straight_and_falls_by_half_a_cosine(samples, rate):
    assert learning_rate(CONFIG, samples, max_samples=1100) == pytest.approx(rate)


def test_without_warm_up_the_rate_starts_at_its_height():
    assert learning_rate(OptimizerConfig(learning_rate=2.0, warmup_samples=0), 0, max_samples=10) == 2.0


def test_a_run_shorter_than_its_warm_up_never_leaves_it():
    assert learning_rate(CONFIG, 40, max_samples=50) == pytest.approx(0.8)
