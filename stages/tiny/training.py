"""How the parts of a teacher are trained on the pictures of a world, each resumable and the same bytes every time."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from transformers import CLIPTokenizer

from stages.prompts import derived_seed
from stages.system.atomic import atomic_path
from stages.system.refusal import Refused, in_one_line
from stages.tiny import anatomy
from stages.tiny.judge import UNNAMED, AttributeClassifier
from stages.tiny.scenes import Scenes


@dataclass(frozen=True)
class TrainingSpec:
    """How long and how fast one part is trained."""

    name: str
    steps: int
    learning_rate: float
    warmup_steps: int = 100
    ema_decay: float = 0.998
    save_every: int = 250
    seed: int | None = None
    """of the random numbers of each step; none: they follow from the name alone"""

    @property
    def stream(self) -> tuple[str | int, ...]:
        """What the random numbers of a step follow from, beside its number."""
        return (self.name,) if self.seed is None else (self.name, self.seed)


def fit_classifier(spec: TrainingSpec, scenes: Scenes, net: AttributeClassifier, work: Path) -> None:
    """Train the classifier on true pictures with a little noise, so that it is robust to a decoder's blur."""
    net.train()

    def loss(generator: torch.Generator) -> Tensor:
        rows = scenes.sample_rows(generator, 64)
        pictures = scenes.normalised(rows)
        noise = 0.15 * torch.rand(64, 1, 1, 1, generator=generator)
        logits = net(pictures + noise * torch.randn(pictures.shape, generator=generator))
        losses = (cross_entropy(row, scenes.labels[rows, i], ignore_index=UNNAMED) for i, row in enumerate(logits))
        return sum(losses, torch.zeros(()))

    train(spec, net, loss, work)


def fit_teacher(
    spec: TrainingSpec,
    latents: Float[Tensor, "n 4 h w"],
    texts: Sequence[str],
    tokenizer: CLIPTokenizer,
    parts: nn.ModuleDict,
    work: Path,
) -> None:
    """Train `unet` and `text_encoder` together on noise prediction, with a tenth of the sentences left empty."""
    alpha_bar = anatomy.build_scheduler().alphas_cumprod
    token_ids = tokenizer(["", *texts], padding="max_length", truncation=True, return_tensors="pt").input_ids

    def loss(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(texts), (64,), generator=generator)
        empty = torch.rand(64, generator=generator) < 0.1
        k = torch.randint(1000, (64,), generator=generator)
        noise = torch.randn(latents[rows].shape, generator=generator)
        alpha, sigma = (part.sqrt()[:, None, None, None] for part in (alpha_bar[k], 1 - alpha_bar[k]))
        cond = parts["text_encoder"](token_ids[torch.where(empty, 0, rows + 1)]).last_hidden_state
        return mse_loss(parts["unet"](alpha * latents[rows] + sigma * noise, k, cond).sample, noise)

    train(spec, parts, loss, work)


def train(spec: TrainingSpec, module: nn.Module, loss_of: Callable[[torch.Generator], Tensor], work: Path) -> None:
    """Minimise `loss_of(generator of the step)`; `module` ends on the moving average of its weights.

    The newest state lies in `work/<name>.pt`, from which a second call resumes.
    """
    optimizer = torch.optim.AdamW(module.parameters(), lr=spec.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    averaged = {name: value.detach().clone() for name, value in module.state_dict().items()}
    path, step, shown, since = work / f"{spec.name}.pt", 0, 0.0, time.perf_counter()
    if path.exists():
        state = read_checkpoint(path)
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        averaged, step = state["averaged"], state["step"]
    while step < spec.steps:
        cosine = 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * step / spec.steps))))
        for group in optimizer.param_groups:
            group["lr"] = spec.learning_rate * min((step + 1) / spec.warmup_steps, cosine)
        loss = loss_of(torch.Generator().manual_seed(derived_seed(*spec.stream, step)))
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
            seconds = time.perf_counter() - since
            print(f"{spec.name}: step {step}/{spec.steps} loss {shown:.4f} {seconds:.0f}s", flush=True)
    module.load_state_dict(averaged)


def load_average(work: Path, part: str, module: nn.Module) -> None:
    """Load the averaged weights of a finished part in place."""
    path = work / f"{part}.pt"
    if not path.exists():
        raise Refused(f"{path} does not exist - run python -m stages.tiny fit --parts {part}")
    module.load_state_dict(read_checkpoint(path)["averaged"])
    module.eval()


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A stored state of `train`; raises `Refused` for a file that is none."""
    try:
        state = torch.load(path, weights_only=True)
        return {name: state[name] for name in ("module", "optimizer", "averaged", "step")}
    except (RuntimeError, UnpicklingError, EOFError, LookupError, TypeError, ValueError) as error:
        raise Refused(f"{path}: cannot be read as a checkpoint: {in_one_line(error, 80)} - delete it") from error
