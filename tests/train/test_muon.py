"""Muon beside AdamW: each updates its own parameters in place."""

import threading
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy

import pytest
import torch
from torch import nn

from stages.train.ema import Ema
from stages.train.optim import OptimizerConfig, build_optimizer, set_learning_rate
from stages.train.optimizers.muon import as_matrix
from stages.train.optimizers.partition import SINGLE_PROCESS, ProcessGroup

CONFIG = OptimizerConfig(kind="muon", learning_rate=0.01, block_rates={"mid": 0.5})
SHAPES = {"mid_block.conv.weight": (6, 4, 3, 3), "mid_block.conv.bias": (6,), "conv_in.weight": (6, 4, 3, 3)}


def weights() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def gradients(steps: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()} for _ in range(steps)]


def learn(parameters, optimizer, steps):
    for step in steps:
        for name, parameter in parameters.items():
            parameter.grad = torch.empty_like(parameter).copy_(step[name])  # in the weight's layout, as autograd's is
        set_learning_rate(optimizer, 0.01)
        optimizer.step()


def test_matrices_of_blocks_move_as_torch_moves_them_up_to_its_bfloat16_and_all_else_as_adamw_does():
    ours, theirs = weights(), weights()
    learn(ours, build_optimizer(CONFIG, ours), gradients(3))

    matrix = nn.Parameter(theirs["mid_block.conv.weight"].detach().flatten(1))
    muon = torch.optim.Muon([matrix], lr=0.005, weight_decay=CONFIG.weight_decay, adjust_lr_fn="match_rms_adamw")
    rates = [{"params": [theirs["mid_block.conv.bias"]], "lr": 0.005}, {"params": [theirs["conv_in.weight"]]}]
    adamw = torch.optim.AdamW(rates, lr=0.01, betas=CONFIG.betas, weight_decay=CONFIG.weight_decay, fused=True)
    for step in gradients(3):
        matrix.grad = step["mid_block.conv.weight"].flatten(1)
        theirs["mid_block.conv.bias"].grad, theirs["conv_in.weight"].grad = (
            step["mid_block.conv.bias"],
            step["conv_in.weight"],
        )
        muon.step()
        adamw.step()
    # three steps of about .001 a weight, each with bfloat16's rounding of 2^-8 and what five iterations make of it
    moved = ours["mid_block.conv.weight"].flatten(1)
    torch.testing.assert_close(moved, matrix, atol=3 * 0.001 * 2**-4, rtol=0)
    assert (moved - weights()["mid_block.conv.weight"].flatten(1)).abs().mean() > 100 * (moved - matrix).abs().mean()
    assert torch.equal(ours["mid_block.conv.bias"], theirs["mid_block.conv.bias"])
    assert torch.equal(ours["conv_in.weight"], theirs["conv_in.weight"])


def test_a_state_of_torchs_muon_is_loaded():
    then, now = weights(), weights()
    named = "mid_block.conv.weight"
    matrix = nn.Parameter(then[named].detach().flatten(1))
    muon = torch.optim.Muon([{"params": [matrix], "share": 0.5}], lr=0.005, weight_decay=CONFIG.weight_decay)
    matrix.grad = gradients(1)[0][named].flatten(1)
    muon.step()
    learn(then, before := build_optimizer(CONFIG, then), gradients(1))
    resumed = build_optimizer(CONFIG, now)
    resumed.load_state_dict(deepcopy({**before.state_dict(), "muon": muon.state_dict()}))
    for name, weight in then.items():
        now[name].data.copy_(weight)
    learn(then, before, gradients(3)[1:])
    learn(now, resumed, gradients(3)[1:])
    assert all(torch.equal(then[name], now[name]) for name in then)


class ThreadProcessGroup(ProcessGroup):
    """Processes that are threads: a broadcast waits for all of them."""

    def __init__(self, rank: int, world: int, meeting: threading.Barrier, table: dict[int, torch.Tensor]) -> None:
        self.rank, self.world, self._meeting, self._table = rank, world, meeting, table

    def broadcast(self, tensor: torch.Tensor, rank: int) -> None:
        if rank == self.rank:
            self._table[rank] = tensor.clone()
        self._meeting.wait(10)
        tensor.copy_(self._table[rank])
        self._meeting.wait(10)


@pytest.mark.parametrize("world", [2, 3, 7])
def test_processes_that_share_the_work_end_on_the_same_bits_and_on_those_of_one_up_to_rounding(world):
    shapes = {f"mid_block.{i}.weight": (4 + i % 3, 5, 1 + i % 2, 1) for i in range(5)} | SHAPES
    generator = torch.Generator().manual_seed(3)
    start = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    steps = [{name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} for _ in range(2)]

    def trained(processes) -> dict[str, nn.Parameter]:
        parameters = {name: nn.Parameter(value.clone()) for name, value in start.items()}
        learn(parameters, build_optimizer(CONFIG, parameters, processes), steps)
        return parameters

    meeting, table = threading.Barrier(world), {}
    with ThreadPoolExecutor(world) as pool:
        several = list(pool.map(lambda rank: trained(ThreadProcessGroup(rank, world, meeting, table)), range(world)))
    alone = trained(SINGLE_PROCESS)
    for name in alone:
        assert all(torch.equal(several[0][name], other[name]) for other in several[1:])
        torch.testing.assert_close(several[0][name], alone[name], atol=1e-6, rtol=0)


def test_it_resumes_to_the_same_bits():
    whole, steps = weights(), gradients(6)
    optimizer = build_optimizer(CONFIG, whole)
    learn(whole, optimizer, steps[:3])
    second = {name: nn.Parameter(weight.detach().clone()) for name, weight in whole.items()}
    resumed = build_optimizer(CONFIG, second)
    resumed.load_state_dict(deepcopy(optimizer.state_dict()))
    learn(whole, optimizer, steps[3:])
    learn(second, resumed, steps[3:])
    assert all(torch.equal(whole[name], second[name]) for name in whole)


def test_it_updates_weights_that_were_swapped_with_their_average():
    plain, swapped = weights(), weights()
    module = nn.Module()
    for name, weight in swapped.items():
        module.register_parameter(name.replace(".", "_"), weight)
    ema, steps = Ema(module), gradients(2)
    for parameters in (plain, swapped):
        optimizer = build_optimizer(CONFIG, parameters)
        learn(parameters, optimizer, steps[:1])
        if parameters is swapped:
            with ema.swapped_in():
                pass
            for weight in swapped.values():
                weight.data = weight.data.clone()  # the same numbers, brought back elsewhere
        learn(parameters, optimizer, steps[1:])
    assert all(torch.equal(plain[name], swapped[name]) for name in plain)


def test_the_memory_format_changes_only_rounding():
    plain, last = weights(), weights()
    for weight in last.values():
        if weight.ndim == 4:
            weight.data = weight.data.to(memory_format=torch.channels_last)
    for parameters in (plain, last):
        learn(parameters, build_optimizer(CONFIG, parameters), gradients(3))
    for name in plain:
        torch.testing.assert_close(last[name], plain[name], atol=1e-6, rtol=0)
    assert not torch.equal(plain["mid_block.conv.weight"], weights()["mid_block.conv.weight"])


def test_a_matrix_is_the_same_memory_and_anything_else_is_refused():
    weight = torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)
    as_matrix(weight)[1, -1] = 7
    assert weight[1, 2, 3, 4] == 7
    with pytest.raises(RuntimeError):
        as_matrix(torch.zeros(3, 2, 4, 5).transpose(0, 1))


def test_matrices_alone_are_enough_as_with_adapters():
    adapter = {"mid_block.lora_A.weight": nn.Parameter(torch.ones(2, 8))}
    optimizer = build_optimizer(OptimizerConfig(kind="muon"), adapter)
    adapter["mid_block.lora_A.weight"].grad = torch.randn(2, 8, generator=torch.Generator().manual_seed(2))
    optimizer.step()
    assert not torch.equal(adapter["mid_block.lora_A.weight"], torch.ones(2, 8))
