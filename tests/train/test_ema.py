import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from stages.nets.student import Student
from stages.tiny.anatomy import build_unet
from stages.train.ema import Ema, EmaConfig, decay, gamma_of

CONFIG = EmaConfig(half_life_samples=100, ramp_ratio=0.1)
POWER = EmaConfig(profile="power", sigma_rel=0.1)


@pytest.mark.parametrize("config", [CONFIG, POWER], ids=["half_life", "power"])
@pytest.mark.parametrize(("start", "end"), [(64, 128), (960, 1088), (2048, 2560)])
def test_the_batch_size_does_not_change_the_decay(config, start, end):
    by_step = [1.0, 1.0]
    for which, size in enumerate((1, 32)):
        for before in range(start, end, size):
            by_step[which] *= decay(config, before, before + size)
    assert by_step == pytest.approx([decay(config, start, end)] * 2)


def test_after_a_half_life_half_remains():
    assert decay(CONFIG, 5000, 5100) == pytest.approx(0.5)


def test_while_it_ramps_up_the_half_life_is_a_share_of_the_samples_seen():
    half_life = 0.1 * 500
    assert decay(CONFIG, 500, 501) == pytest.approx(2 ** (-1 / half_life), rel=1e-4)


@pytest.mark.parametrize("config", [CONFIG, POWER], ids=["half_life", "power"])
def test_the_untrained_weights_are_forgotten_at_the_first_step(config):
    assert decay(config, 0, 2) == 0.0


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.25])
def test_the_power_profile_has_the_requested_deviation(sigma_rel):
    config, end = EmaConfig(profile="power", sigma_rel=sigma_rel), 3000
    # The average of the sample numbers themselves, and of their squares, weighted as the weights at these times.
    mean, square = 0.0, 0.0
    for before, after in pairwise(range(end + 1)):
        kept, moment = decay(config, before, after), after - 0.5
        mean, square = kept * mean + (1 - kept) * moment, kept * square + (1 - kept) * moment**2
    assert math.sqrt(square - mean**2) / end == pytest.approx(sigma_rel, rel=1e-4)


def test_a_step_of_one_sample_decays_by_the_published_power():
    assert decay(POWER, 499, 500) == pytest.approx((1 - 1 / 500) ** (gamma_of(0.1) + 1))


def test_a_half_life_that_is_still_ramping_up_is_a_power_profile():
    ramping = EmaConfig(half_life_samples=10**9, ramp_ratio=math.log(2) / (gamma_of(0.1) + 1))
    assert decay(ramping, 300, 700) == pytest.approx(decay(POWER, 300, 700))


def test_a_profile_wider_than_a_flat_one_is_refused():
    with pytest.raises(ValueError, match="sigma_rel"):
        EmaConfig(profile="power", sigma_rel=0.29)


def test_the_average_of_a_student_from_a_half_precision_teacher_is_kept_in_fp32():
    averages = Ema(Student.from_teacher(build_unet().half())).tensors().values()
    assert {average.dtype for average in averages} == {torch.float32}


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
    with ema.swapped_in():
        assert torch.equal(module.weight, own)
    assert torch.equal(module.weight, own + 1)
    assert torch.equal(ema.tensors()["weight"], own)
