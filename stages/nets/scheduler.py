"""The stock schedulers by which other programs sample a student, each made from one number or one config."""

from pathlib import Path

from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

from stages.teacher_files.folder import read_json

VP_SETTINGS = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr",
    "timestep_spacing", "steps_offset",
)  # fmt: skip


def flow_scheduler(flow_shift: float = 1.0) -> UniPCMultistepScheduler:
    """The stock scheduler with which the stock pipeline samples a velocity model (formats.md 3.1).

    Order 1 is Euler's predictor with UniPC's corrector: together of order 2, at one call a step. Higher orders do worse
    under guidance at few steps. On a half-trained embedded teacher's velocity, guidance 5, relative squared error
    against 60 Heun steps at 4, 8, 16, 25 steps: order 1 .43 .046 .0010 .0004, order 2 .79 .157 .0044 .0004, order 3
    .79 .33 .096 .0075, plain Euler .52 .043 .0023 .0008. `steps_offset` does not enter the flow grid; without it the
    pipeline warns of an outdated config. The teacher's betas are left out: nothing reads them here.
    """
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=flow_shift,
        solver_order=1,
        final_sigmas_type="zero",
        steps_offset=1,
    )


def window_scheduler() -> DPMSolverMultistepScheduler:
    """The stock scheduler of a student of few steps: order 1 is Euler's method, on the ends of as many windows.

    UniPC would correct each step, also at order 1, and begin at s = 1. See `flow_scheduler` for `steps_offset`.
    `lambda_min_clipped` does not enter the flow grid; its default is minus infinity, which is no JSON.
    """
    return DPMSolverMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=1.0,
        solver_order=1,
        final_sigmas_type="zero",
        lambda_min_clipped=-100.0,
        steps_offset=1,
    )


def vp_scheduler(teacher_folder: Path) -> DDIMScheduler:
    """DDIM on the teacher's own betas and steps, for a student that predicts v on the teacher's path."""
    config = read_json(teacher_folder / "scheduler" / "scheduler_config.json")
    kept = {name: config[name] for name in VP_SETTINGS if name in config}
    return DDIMScheduler(**kept, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False)
