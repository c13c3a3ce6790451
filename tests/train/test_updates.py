import pytest
import torch
from torch import nn

from stages.train.optim import MAX_SAMPLED_WEIGHTS, UpdateRatios


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down_blocks = nn.ModuleList([nn.Linear(3, 2)])
        self.mid_block = nn.ModuleDict({"conv": nn.Conv2d(32, 64, 3)})
        self.conv_out = nn.Linear(2, 2)


def move(net: nn.Module, factor: float) -> None:
    with torch.no_grad():
        for parameter in net.parameters():
            parameter *= factor


def test_a_step_of_a_hundredth_has_a_ratio_of_a_hundredth_in_every_block():
    net = Net()
    updates = UpdateRatios(dict(net.named_parameters()))
    updates.record_weights()
    move(net, 1.01)
    assert updates.ratios() == pytest.approx({"down_0": 0.01, "mid": 0.01, "rest": 0.01}, rel=1e-3)
    assert updates.ratios() == {}


def test_a_block_that_stays_has_a_ratio_of_zero():
    net = Net()
    updates = UpdateRatios(dict(net.named_parameters()))
    updates.record_weights()
    move(net.mid_block, 2.0)
    assert updates.ratios() == pytest.approx({"down_0": 0.0, "mid": 1.0, "rest": 0.0})


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_sample_of_the_weights_estimates_the_ratio_of_all(layout):
    generator = torch.Generator().manual_seed(0)
    net = Net().to(memory_format=layout)
    conv = net.mid_block["conv"].weight
    assert conv.numel() > 4 * MAX_SAMPLED_WEIGHTS
    before = conv.detach().clone()
    updates = UpdateRatios({"mid_block.conv.weight": conv})
    updates.record_weights()
    with torch.no_grad():
        # Each place of the kernel moves differently, so that a sample of one place alone would be wrong.
        conv += torch.randn(conv.shape, generator=generator) * torch.arange(9).view(3, 3) / 100
    exact = float((conv.detach() - before).norm() / before.norm())
    assert updates.ratios()["mid"] == pytest.approx(exact, rel=0.05)


def test_it_holds_no_more_than_a_few_thousand_weights_of_each_parameter():
    net = Net()
    updates = UpdateRatios(dict(net.named_parameters()))
    updates.record_weights()
    assert max(sampled.numel() for sampled in updates._recorded.values()) <= MAX_SAMPLED_WEIGHTS
