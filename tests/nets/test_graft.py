"""Laws of the closed-form start of the time embedding."""

import copy
from types import SimpleNamespace

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps

from stages.flow.bridge import Bridge
from stages.flow.schedule import NoiseSchedule
from stages.nets.graft import graft_time_embedding
from stages.tiny.anatomy import build_scheduler, build_unet

BRIDGE = Bridge(NoiseSchedule.from_config(build_scheduler().config))


def embedding(unet, t: torch.Tensor) -> torch.Tensor:  # type: ignore[no-untyped-def]
    return unet.time_embedding(unet.time_proj(t))


def test_the_student_reads_its_time_as_the_teacher_reads_its_step() -> None:
    torch.manual_seed(0)
    student = SimpleNamespace(time_proj=Timesteps(320, True, 0), time_embedding=TimestepEmbedding(320, 1280))
    teacher = copy.deepcopy(student)
    s = torch.linspace(0.05, 0.93, 50, dtype=torch.float64)
    with torch.no_grad():
        wanted = embedding(teacher, BRIDGE.k_of_s(s).float())
        before = (embedding(student, (1000 * s).float()) - wanted).norm() / wanted.norm()
        graft_time_embedding(student, BRIDGE)
        after = (embedding(student, (1000 * s).float()) - wanted).norm() / wanted.norm()
    assert before > 0.5
    assert after < 0.05


def test_only_the_second_layer_changes() -> None:
    unet = build_unet()
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    graft_time_embedding(unet, BRIDGE)
    changed = {name for name, value in unet.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"time_embedding.linear_2.weight", "time_embedding.linear_2.bias"}
