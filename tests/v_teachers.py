"""v-predicting teachers for tests: the embedded teacher with its last block trained to answer v of its own answers."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor

from stages.flow.bridge import Bridge
from stages.flow.path import per_sample
from stages.flow.schedule import NoiseSchedule
from stages.nets.components import load_components
from stages.nets.features import copy_without_hooks
from stages.nets.teacher import Teacher

EMBEDDED = Path("stages/tiny/model")
SCHEDULER = "scheduler/scheduler_config.json"
STATES, BATCH, STEPS, LEARNING_RATE = 1024, 32, 200, 6e-3
LABELS: Mapping[str, dict[str, Any]] = {
    "epsilon": {"prediction_type": "epsilon", "rescale_betas_zero_snr": False},
    "v": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": False},
    "v, zero terminal SNR": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
}


def label(folder: Path, name: str) -> None:
    """Write a prediction type into a folder's scheduler config, true or not."""
    path = folder / SCHEDULER
    path.write_text(json.dumps({**json.loads(path.read_text()), **LABELS[name]}))


def make_teacher(folder: Path, name: str) -> Path:
    """A teacher that predicts what `name` says, rightly labelled."""
    shutil.copytree(EMBEDDED, folder)
    label(folder, name)
    if name != "epsilon":
        unet = train_v(NoiseSchedule.from_config(json.loads((folder / SCHEDULER).read_text())))
        weights = {key: value.contiguous() for key, value in unet.state_dict().items()}
        save_file(weights, folder / "unet/diffusion_pytorch_model.safetensors", {"format": "pt"})
    return folder


def train_v(schedule: NoiseSchedule) -> UNet2DConditionModel:
    """The embedded teacher's UNet, its last block trained on v of a schedule, at states whose answers are exact."""
    teacher = Teacher(load_components(str(EMBEDDED), torch.device("cpu"), torch.float32), "hold")
    unet = copy_without_hooks(teacher.components.unet)
    x, k, cond, target = answers(teacher, Bridge(schedule))
    inputs, skips, embedding = trunk(unet, x, k, cond)
    head = torch.nn.ModuleList([unet.up_blocks[3], unet.conv_norm_out, unet.conv_out]).requires_grad_(True)
    optimizer = torch.optim.AdamW(head.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0)
    decay = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS, pct_start=0.1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        rows = torch.randint(0, STATES, (BATCH,), generator=generator)
        hidden = unet.up_blocks[3](
            inputs[rows], tuple(skip[rows] for skip in skips), embedding[rows], encoder_hidden_states=cond[rows]
        )
        output = unet.conv_out(unet.conv_act(unet.conv_norm_out(hidden)))
        optimizer.zero_grad()
        (output - target[rows]).pow(2).mean().backward()
        optimizer.step()
        decay.step()
    return unet.eval().requires_grad_(False)


@torch.inference_mode()
def answers(teacher: Teacher, bridge: Bridge) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """States, steps (more of them noisy) and conditionings, and v of the teacher's answers there."""
    generator = torch.Generator().manual_seed(0)
    steps = bridge.schedule.steps
    k = steps - 1 - (torch.rand(STATES, generator=generator) ** 1.5 * steps).long()
    s = bridge.s_of_k(k)
    texts = ["", "a small red star at the left on a blue background", "a purple heart", "a large green ring"]
    cond = teacher.encode_texts(texts)[torch.randint(0, len(texts), (STATES,), generator=generator)]
    x = torch.randn(STATES, *teacher.components.latent_shape(), generator=generator)
    own_k, linear = teacher.bridge.k_of_s(s), x.double() / per_sample((s**2 + (1 - s) ** 2) ** -0.5, x)
    output = torch.cat([
        teacher.components.unet(x[rows], own_k[rows].float(), cond[rows]).sample
        for rows in torch.arange(STATES).split(256)
    ])  # fmt: skip
    v = teacher.bridge.velocity(linear, s, own_k, output.double())
    x0, eps = linear - per_sample(s, x) * v, linear + per_sample(1 - s, x) * v
    alpha, sigma = bridge.schedule.alpha_bar[k].sqrt(), (1 - bridge.schedule.alpha_bar[k]).sqrt()
    return x, k, cond, (per_sample(alpha, x) * eps - per_sample(sigma, x) * x0).float()


@torch.no_grad()
def trunk(unet: UNet2DConditionModel, x: Tensor, k: Tensor, cond: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
    """What the last block receives at each state: hidden states, skip connections, time embedding."""
    seen: list[Mapping[str, Any]] = []
    hook = unet.up_blocks[3].register_forward_pre_hook(
        lambda _module, _arguments, named: seen.append(named), with_kwargs=True
    )
    for rows in torch.arange(len(x)).split(256):
        unet(x[rows], k[rows], cond[rows])
    hook.remove()
    skips = zip(*(named["res_hidden_states_tuple"] for named in seen), strict=True)
    inputs, embeddings = (torch.cat([named[name] for named in seen]) for name in ("hidden_states", "temb"))
    return inputs, [torch.cat(one) for one in skips], embeddings
