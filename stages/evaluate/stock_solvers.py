"""Solvers of diffusers on our own fields: latents that the stock pipeline would draw, without the pipeline."""

from dataclasses import dataclass

from diffusers import DDIMScheduler
from jaxtyping import Float
from torch import Tensor

from stages.flow.bridge import Bridge
from stages.flow.solver import Velocity, of_each
from stages.nets.scheduler import flow_scheduler
from stages.nets.student import TIME_SCALE


def unipc(velocity: Velocity, noise: Float[Tensor, "b c h w"], steps: int, shift: float) -> Float[Tensor, "b c h w"]:
    """UniPC as exports ship it; it tells a model whole times 1000 s, as the stock pipeline does."""
    scheduler = flow_scheduler(shift)
    scheduler.set_timesteps(steps)
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(velocity(x, of_each(float(t) / TIME_SCALE, x)), t, x).prev_sample
    return x


@dataclass(frozen=True)
class Ddim:
    """DDIM on the discrete steps of a model that lives on the VP path, through that model's linear field."""

    bridge: Bridge
    scheduler: DDIMScheduler
    """It predicts v: any field's answer becomes that, whatever the network itself predicts."""

    def solve(self, velocity: Velocity, noise: Float[Tensor, "b c h w"], steps: int) -> Float[Tensor, "b c h w"]:
        """Latents at the scheduler's last step.

        x_vp = g x, and v = (sigma - alpha) x_vp + g v_vp with g = alpha + sigma (mathematics, section 1).
        """
        self.scheduler.set_timesteps(steps)
        x_vp = noise
        for k in self.scheduler.timesteps:
            s = float(self.bridge.s_of_k(k[None]))
            g = (s**2 + (1 - s) ** 2) ** -0.5
            v = velocity(x_vp / g, of_each(s, x_vp))
            v_vp = (v - (2 * s - 1) * g * x_vp) / g
            x_vp = self.scheduler.step(v_vp, int(k), x_vp).prev_sample
        return x_vp
