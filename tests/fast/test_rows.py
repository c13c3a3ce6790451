"""Laws of the rows of training in windows."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from shards.batch import Batch
from stages.fast.rows import NEAR, RowShares, landing_ends, window_batch
from stages.flow.path import per_sample
from stages.flow.windows import FIRST_TIME, window_ends, window_of

ENDS = window_ends(4)
TIMES = [0.0, 0.1, 0.2499, 0.25, 0.3, 0.5, 0.74, 0.7503, 0.95, 0.9995, 1.0, 0.4]
"""Of the rows' own states; that of the last one is renoised."""


def trajectory(row: int, s: Tensor) -> Tensor:
    """A curved path of one row, [n, 2, 3, 3], at the times s; at b_0 it has not left the noise at s = 1."""
    a, b, c = torch.randn(3, 2, 3, 3, generator=torch.Generator().manual_seed(row)).double()
    s = s.double().clamp_max(FIRST_TIME).reshape(-1, 1, 1, 1)
    return a + s * b + (3 * s).sin() * c


def make_batch(times: list[float] = TIMES) -> Batch:
    """A row for each time, with the landings of four windows, in double precision."""
    s, count = torch.tensor(times), len(times)
    landings = torch.cat([torch.ones(1), ENDS[1:].float()])
    v_cond, v_uncond = torch.randn(2, count, 2, 3, 3, generator=torch.Generator().manual_seed(99))
    return Batch(
        keys=tuple(f"{row:09d}" for row in range(count)),
        texts=("a star",) * count,
        class_names=("",) * count,
        cond=torch.zeros(count, 2, 5),
        x_s=torch.cat([trajectory(row, s[row : row + 1]) for row in range(count)]),
        v_cond=v_cond,
        v_uncond=v_uncond,
        s=s,
        k=torch.zeros(count, dtype=torch.int64),
        features={"mid": torch.zeros(count, 3)},
        state_index=torch.zeros(count, dtype=torch.int64),
        landing_x=torch.stack([trajectory(row, landings) for row in range(count)]),
        landing_s=landings.repeat(count, 1),
        guidance_scale=torch.linspace(3, 8, count),
        trajectory=torch.arange(count) < count - 1,
    )


SAMPLES = torch.arange(len(TIMES)) + 7


@pytest.mark.parametrize("windows", [1, 2, 4])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_one_euler_step_of_the_target_lands_at_the_end_of_the_window(windows: int, share: float) -> None:
    rows, ends = window_batch(make_batch(), SAMPLES, windows, RowShares(share), 0), window_ends(windows)
    end = ends[window_of(rows.s, ends) + 1].float()
    far = rows.s - end >= NEAR
    landed = rows.x_s + per_sample(end - rows.s, rows.x_s) * rows.v_cond
    expected = torch.cat([trajectory(row, end[row : row + 1]) for row in range(len(rows))]).float()
    torch.testing.assert_close(landed[far], expected[far], atol=1e-5, rtol=1e-5)
    assert int(far.sum()) >= 7
    assert torch.equal(rows.v_cond, rows.v_uncond)


def test_rows_on_the_trajectory_keep_their_states_but_for_a_share_and_others_take_landings() -> None:
    batch = make_batch([0.4] * 400)
    kept = window_batch(batch, torch.arange(400), 4, RowShares(0.25), 0).s == batch.s
    assert not kept[-1]
    assert 0.68 < float(kept.double().mean()) < 0.82
    assert int((window_batch(batch, torch.arange(400), 4, RowShares(0.0), 0).s == batch.s).sum()) == 399
    begun = window_batch(batch, torch.arange(400), 4, RowShares(1.0), 0).s
    assert set(begun.tolist()) == set(ENDS[:-1].float().tolist())
    assert 60 < int((begun == begun.max()).sum()) < 140, "each window begins as often"


def test_a_landing_is_a_state_of_the_trajectory_and_the_first_is_the_noise() -> None:
    rows = window_batch(make_batch(), SAMPLES, 4, RowShares(1.0), 0)
    expected = torch.cat([trajectory(row, rows.s[row : row + 1]) for row in range(len(rows))])
    torch.testing.assert_close(rows.x_s.double(), expected, atol=1e-6, rtol=1e-6)
    assert float(rows.s.max()) == pytest.approx(FIRST_TIME)
    noise, x0 = landing_ends(make_batch())
    assert torch.equal(noise[0], trajectory(0, torch.ones(1))[0].float())
    assert torch.equal(x0[0], trajectory(0, torch.zeros(1))[0].float())


def test_no_state_is_later_than_where_stock_samplers_begin() -> None:
    rows = window_batch(make_batch(), SAMPLES, 4, RowShares(0.0), 0)
    assert float(rows.s.max()) == pytest.approx(FIRST_TIME)
    assert torch.equal(rows.x_s[-3:-1], make_batch().x_s[-3:-1].float())


def test_close_to_the_end_of_its_window_a_state_has_the_guided_velocity_there() -> None:
    batch = make_batch([0.253, 0.252, 0.001, 0.4])
    rows = window_batch(batch, torch.arange(4), 4, RowShares(0.0), 0)
    w = per_sample(batch.guidance_scale, batch.v_cond)
    guided = batch.v_uncond + w * (batch.v_cond - batch.v_uncond)
    torch.testing.assert_close(rows.v_cond[:3], guided[:3])


def test_a_row_is_a_function_of_its_sample_number_and_the_seed_alone() -> None:
    batch = make_batch()
    whole = window_batch(batch, SAMPLES, 4, RowShares(0.5), 0)
    half = window_batch(batch.rows(slice(1, None, 2)), SAMPLES[1::2], 4, RowShares(0.5), 0)
    assert torch.equal(half.x_s, whole.x_s[1::2])
    assert torch.equal(half.v_cond, whole.v_cond[1::2])
    assert not torch.equal(window_batch(batch, SAMPLES, 4, RowShares(0.5), 1).s, whole.s)
    assert not torch.equal(window_batch(batch, SAMPLES + 64, 4, RowShares(0.5), 0).s, whole.s)


def test_half_precision_loses_little_of_a_target() -> None:
    batch, exact = make_batch(), window_batch(make_batch(), SAMPLES, 4, RowShares(0.5), 0)
    assert batch.landing_x is not None
    half = replace(batch, x_s=batch.x_s.half(), landing_x=batch.landing_x.half())
    rows = window_batch(half, SAMPLES, 4, RowShares(0.5), 0)
    assert rows.x_s.dtype == rows.v_cond.dtype == torch.float32
    error = (rows.v_cond - exact.v_cond).square().mean() / exact.v_cond.square().mean()
    assert float(error) < 1e-4
