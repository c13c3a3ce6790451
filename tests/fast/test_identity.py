"""Laws of the targets that follow from the identity of average velocities, where no landing is stored."""

from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor

from shards.batch import Batch
from stages import __main__ as cli
from stages.fast.identity import identity_targets
from stages.fast.rows import RowShares, window_batch
from stages.flow.path import per_sample
from stages.flow.windows import FIRST_TIME, landing_velocity, window_ends, window_of
from stages.nets.run_folder import open_run
from stages.nets.student import Student
from stages.train.journal import read_events
from tests.fast.runs import CONFIG, FEW_PROMPTS, GRID, command
from tests.fast.test_rows import SAMPLES, make_batch

RATE = 1.7


class ExactStudent:
    """Lands exactly on the trajectories of dx/ds = w RATE x in each of its windows."""

    def __init__(self, windows: int) -> None:
        self.ends = window_ends(windows).float()

    def velocity(self, x: Tensor, s: Tensor, _cond: Tensor, guidance: Tensor) -> Tensor:
        end = self.ends[window_of(s, self.ends) + 1]
        return landing_velocity(x, s, x * per_sample((RATE * guidance * (end - s)).exp(), x), end)


def renoised(windows: int, times: list[float]) -> Batch:
    """Rows off the trajectory whose teacher is the flow that `ExactStudent` lands on."""
    batch = make_batch(times)
    w = torch.linspace(0.5, 1.5, len(times))
    v = RATE * per_sample(w, batch.x_s) * batch.x_s
    batch = replace(batch, v_cond=v, v_uncond=v, guidance_scale=w, trajectory=torch.zeros(len(times), dtype=torch.bool))
    return window_batch(batch, torch.arange(len(times)), windows, RowShares(0.5, identity=1), 0)


@pytest.mark.parametrize("windows", [1, 2, 4, 8])
def test_an_exact_student_is_its_own_target(windows: int) -> None:
    times = [0.001, 0.1, 0.125, 0.2499, 0.2502, 0.4, 0.499, 0.503, 0.75, 0.9, 0.9989, FIRST_TIME, 1.0]
    rows, student = renoised(windows, times), ExactStudent(windows)
    assert rows.trajectory is not None
    assert not rows.trajectory.any()
    assert torch.equal(rows.s, torch.tensor(times).clamp_max(FIRST_TIME))
    assert rows.guidance_scale is not None
    exact = student.velocity(rows.x_s, rows.s, rows.cond, rows.guidance_scale)
    targets = identity_targets(cast(Student, student), rows, windows)
    errors = (targets.v_cond - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    assert float(errors.max()) < 0.01
    assert torch.equal(targets.v_cond, targets.v_uncond)
    guided = (rows.v_cond - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    assert float(guided.max()) > 0.1, "the identity must add to the guided velocity"


def test_rows_whose_landing_is_stored_keep_it_and_the_share_of_the_others_is_held() -> None:
    rows = window_batch(make_batch(), SAMPLES, 4, RowShares(0.5, identity=1), 0)
    targets = identity_targets(cast(Student, ExactStudent(4)), rows, 4)
    assert torch.equal(targets.v_cond[:-1], rows.v_cond[:-1])
    assert not torch.equal(targets.v_cond[-1], rows.v_cond[-1])
    batch = make_batch([0.4] * 400)
    batch = replace(batch, trajectory=torch.zeros(400, dtype=torch.bool))
    for share in (0.0, 0.25, 1.0):
        lands = window_batch(batch, torch.arange(400), 4, RowShares(0.5, identity=share), 0).trajectory
        assert lands is not None
        assert abs(float((~lands).double().mean()) - share) < (0.07 if 0 < share < 1 else 1e-9)


def test_without_landings_the_last_window_alone_is_known() -> None:
    batch = make_batch()
    assert batch.landing_x is not None
    assert batch.landing_s is not None
    older = replace(batch, landing_x=batch.landing_x[:, -1:], landing_s=batch.landing_s[:, -1:])
    rows = window_batch(older, SAMPLES, 4, RowShares(0.5, identity=1), 0)
    assert rows.trajectory is not None
    assert torch.equal(rows.s, batch.s.clamp_max(FIRST_TIME))
    assert rows.trajectory.tolist() == [bool(s <= window_ends(4)[3]) for s in rows.s[:-1]] + [False]
    far = rows.trajectory & (rows.s > 0.01)
    landed = rows.x_s - per_sample(rows.s, rows.x_s) * rows.v_cond
    torch.testing.assert_close(landed[far], batch.landing_x[far, -1].float(), atol=1e-5, rtol=1e-5)


def test_a_cache_of_an_earlier_schema_trains_by_the_identity_alone(tmp_path: Path) -> None:
    run = tmp_path / "run"
    older = ("--render.states.windows", "0")
    assert cli.main(["cache-teacher", *CONFIG, "--run", str(run), *FEW_PROMPTS, *older]) == 0
    few = ("--david.fusion.formula", "static", "--train.max-samples", "4", "--train.batch-size", "4", *GRID)
    assert cli.main(["distill", *CONFIG, "--run", str(run), *few, "--validation.states", "0"]) == 0
    assert cli.main(command(run, "--windows", "4", "1", "--fast.identity-share", "1")) == 0
    for windows in (4, 1):
        folder = run / f"fast/{windows}"
        assert open_run(folder).origin.windows == windows
        last = read_events(folder, "validation", 24)[-1]
        assert last["landing"] > 0
        assert "end" not in last
        assert "landing of a single step" in (folder / "export/diffusers/README.md").read_text()
