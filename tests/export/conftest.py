"""A teacher with random weights, and a student that differs from it in every tensor."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from stages.export.diffusers import export_diffusers
from stages.nets.student import Student
from stages.tiny import anatomy


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = anatomy.build_tokenizer()
        StableDiffusionPipeline(
            unet=anatomy.build_unet(),
            vae=anatomy.build_vae(),
            text_encoder=anatomy.build_text_encoder(tokenizer),
            tokenizer=tokenizer,
            scheduler=anatomy.build_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(folder)
    return folder


def distilled(teacher_folder: Path) -> Student:
    student = Student.from_teacher(UNet2DConditionModel.from_pretrained(teacher_folder, subfolder="unet"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in student.unet.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return student.eval()


@pytest.fixture
def student(teacher_folder: Path) -> Student:
    return distilled(teacher_folder)


@pytest.fixture(scope="session")
def exported(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export in fp32 that no test may change."""
    out, facts = tmp_path_factory.mktemp("export"), {"samples": 64, "tail": "hold"}
    return export_diffusers(distilled(teacher_folder), teacher_folder, out, facts, torch.float32)
