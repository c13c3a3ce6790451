"""A plain training loop for the parts of the embedded teacher: cosine schedule, moving average, resumable."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from stages.prompts import derived_seed
from stages.system.atomic import atomic_path


@dataclass(frozen=True)
class TrainingSpec:
    """How long and how fast one part is trained."""

    name: str
    steps: int
    learning_rate: float
    warmup_steps: int = 100
    ema_decay: float = 0.998
    save_every: int = 250


def train(spec: TrainingSpec, module: nn.Module, loss_of: Callable[[torch.Generator], Tensor], work: Path) -> nn.Module:
    """Minimise `loss_of(generator of the step)`; returns `module` holding the moving average of its weights.

    The newest state lies in `work/<name>.pt`; a second call goes on from there.
    """
    optimizer = torch.optim.AdamW(module.parameters(), lr=spec.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    averaged = {name: value.detach().clone() for name, value in module.state_dict().items()}
    path, step, shown, since = work / f"{spec.name}.pt", 0, 0.0, time.perf_counter()
    if path.exists():
        state = torch.load(path, weights_only=True)
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        averaged, step = state["averaged"], state["step"]
    while step < spec.steps:
        rate = spec.learning_rate * min((step + 1) / spec.warmup_steps, cosine(step, spec.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of(torch.Generator().manual_seed(derived_seed(spec.name, step)))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        step += 1
        decay = min(spec.ema_decay, (step + 1) / (step + 10))
        with torch.no_grad():
            for name, value in module.state_dict().items():
                averaged[name].lerp_(value, 1 - decay) if value.is_floating_point() else averaged[name].copy_(value)
        shown = loss.item() if step == 1 else 0.98 * shown + 0.02 * loss.item()
        if step % spec.save_every == 0 or step == spec.steps:
            with atomic_path(path) as temporary:
                state = {"module": module.state_dict(), "optimizer": optimizer.state_dict(), "averaged": averaged}
                torch.save({**state, "step": step}, temporary)
            print(
                f"{spec.name}: step {step}/{spec.steps} loss {shown:.4f} {time.perf_counter() - since:.0f}s", flush=True
            )
    module.load_state_dict(averaged)
    return module.eval()


def cosine(step: int, steps: int) -> float:
    """From 1 at the first step to 0 after the last."""
    return 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * step / steps))))
