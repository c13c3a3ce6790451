import pytest
import torch
from torch import nn

from stages.train.ema import Ema, EmaConfig, decay

CONFIG = EmaConfig(half_life_samples=100, ramp_ratio=0.1)


@pytest.mark.parametrize(("start", "end"), [(64, 128), (960, 1088), (2048, 2560)])
def test_the_batch_size_does_not_move_the_decay(start, end):
    by_step = [1.0, 1.0]
    for which, size in enumerate((1, 32)):
        for before in range(start, end, size):
            by_step[which] *= decay(CONFIG, before, before + size)
    assert by_step == pytest.approx([decay(CONFIG, start, end)] * 2)


def test_after_a_half_life_half_is_left():
    assert decay(CONFIG, 5000, 5100) == pytest.approx(0.5)


def test_while_it_ramps_up_the_half_life_is_a_share_of_the_samples_seen():
    half_life = 0.1 * 500
    assert decay(CONFIG, 500, 501) == pytest.approx(2 ** (-1 / half_life), rel=1e-4)


def test_the_untrained_weights_are_forgotten_at_the_first_step():
    assert decay(CONFIG, 0, 2) == 0.0


def test_an_update_moves_the_average_by_what_is_not_kept():
    module = nn.Linear(1, 1, bias=False)
    module.weight.data.fill_(1.0)
    ema = Ema(module)
    module.weight.data.fill_(5.0)
    ema.update(0.75)
    assert ema.tensors()["weight"].item() == 2.0
    assert module.weight.item() == 5.0


def test_the_module_gets_its_own_weights_back():
    module = nn.Linear(2, 2)
    ema, own = Ema(module), module.weight.detach().clone()
    ema.update(0.0)
    module.weight.data.add_(1.0)
    with ema.worn():
        assert torch.equal(module.weight, own)
    assert torch.equal(module.weight, own + 1)
    assert torch.equal(ema.tensors()["weight"], own)
