"""The training step of diffusers' example, one branch: noise, add_noise, UNet, mean square, update.

Its pictures and prompts are encoded and its batches made beforehand, so its time is without data loading.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor


def step_seconds(
    unet: UNet2DConditionModel,
    batches: Iterator[tuple[Tensor, Tensor]],
    steps: int,
    device: torch.device,
    now: Callable[[], float],
    *,
    precision: str = "no",
    accumulate: int = 1,
) -> list[float]:
    """Seconds of each step on (latents, conditioning), with the example's EMA and its logged loss.

    `precision` is accelerate's name of it; a step is done in `accumulate` parts of equal size.
    """
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=precision)
    schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, weight_decay=1e-2)
    rate = get_scheduler("constant", optimizer)
    unet, optimizer, rate = accelerator.prepare(unet.train(), optimizer, rate)
    average = EMAModel(accelerator.unwrap_model(unet).parameters())
    seconds = []
    for _ in range(steps):
        latents, cond = (part.to(accelerator.device) for part in next(batches))
        start = now()
        for x0, text in zip(latents.chunk(accumulate), cond.chunk(accumulate), strict=True):
            noise = torch.randn_like(x0)
            k = torch.randint(0, schedule.config["num_train_timesteps"], (len(x0),), device=x0.device)
            output = unet(schedule.add_noise(x0, noise, k), k, text, return_dict=False)[0]
            loss = F.mse_loss(output.float(), noise.float(), reduction="mean")
            accelerator.backward(loss / accumulate)
        accelerator.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        average.step(accelerator.unwrap_model(unet).parameters())
        accelerator.gather(loss.detach().repeat(len(latents))).mean().item()
        seconds.append(now() - start)
    return seconds
