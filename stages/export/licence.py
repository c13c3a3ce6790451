"""The licence of a student's weights: its teacher's, as the teacher's own card states it."""

from pathlib import Path

from huggingface_hub import ModelCard

OPENRAIL = "creativeml-openrail-m"
STABLE_DIFFUSION_1 = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "runwayml/stable-diffusion-v1-5",
    *(f"CompVis/stable-diffusion-v1-{k}" for k in (1, 2, 3, 4)),
}
"""Hub ids whose licence is known without their card."""
FIELDS = ("license", "license_name", "license_link")


def licence_of(teacher_folder: Path, base_model: str | None = None) -> dict[str, str]:
    """The head's fields of the teacher's card, or what its hub id is known for; empty when nothing states a licence."""
    stated = _of_card(teacher_folder / "README.md")
    if "license" in stated:
        return stated
    return {"license": OPENRAIL} if base_model in STABLE_DIFFUSION_1 else {}


def licence_files(teacher_folder: Path) -> list[Path]:
    """The teacher's licence texts, which go where its weights go."""
    return sorted(path for path in teacher_folder.glob("LICENSE*") if path.is_file())


def _of_card(file: Path) -> dict[str, str]:
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    if not text.startswith("---"):
        return {}
    head = ModelCard(text, ignore_metadata_errors=True).data
    return {key: value for key in FIELDS if isinstance(value := head.get(key), str)}
