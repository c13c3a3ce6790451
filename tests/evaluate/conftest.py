"""A teacher with random weights, a student near it, and a run folder that holds both beside a small cache."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

from shards.writer import CacheWriter
from stages.cache.targets import RenderConfig, StatesConfig, make_records, recipe_of
from stages.export.diffusers import export_diffusers
from stages.export.verify_export import ExportOptions
from stages.nets.components import load_components
from stages.nets.graft import graft_time_embedding
from stages.nets.run_folder import Origin
from stages.nets.student import Student
from stages.nets.teacher import Teacher
from stages.prompts import Prompt
from stages.tiny import anatomy

SAMPLES = 64


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = anatomy.build_tokenizer()
        unet = anatomy.build_unet()
        with torch.no_grad():
            unet.conv_out.weight *= 3  # the output of an untrained network is small
        StableDiffusionPipeline(
            unet=unet,
            vae=anatomy.build_vae(),
            text_encoder=anatomy.build_text_encoder(tokenizer),
            tokenizer=tokenizer,
            scheduler=anatomy.build_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def teacher(teacher_folder: Path) -> Teacher:
    return Teacher(load_components(str(teacher_folder), torch.device("cpu"), torch.float32), "hold")


@pytest.fixture(scope="session")
def student(teacher: Teacher) -> Student:
    student = Student.from_teacher(teacher.components.unet)
    graft_time_embedding(student.unet, teacher.bridge)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in student.unet.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    return student.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def run_folder(teacher: Teacher, student: Student, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What caching and distillation write, as far as an evaluation reads it."""
    root = tmp_path_factory.mktemp("runs")
    states = StatesConfig(steps=3, trajectory_states=2, renoised_states=1)
    writer = CacheWriter(root / "cache", recipe_of(teacher, RenderConfig(states=states), {"source": "test"}))
    prompts = [Prompt("a red star", "shape/star", 1), Prompt("a blue ring", "shape/ring", 2)]
    for split in ("train", "validation"):
        writer.add(split, 0, make_records(teacher, prompts, ["000000000", "000000001"], states))
    run = root / "distill"
    checkpoint = run / "checkpoints" / f"{SAMPLES:09d}"
    checkpoint.mkdir(parents=True)
    save_file(student.state_dict(), checkpoint / "ema.safetensors")
    Origin.from_manifest(writer.manifest).save(run)
    export_diffusers(
        student,
        teacher.components.folder,
        run / "export",
        {"samples": SAMPLES, "teacher": "random"},
        ExportOptions(dtype="float32"),
    )
    return run
