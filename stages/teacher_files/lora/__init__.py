"""LoRA files: how their keys are spelled, how often their pairs count, and their merging into a teacher's weights."""

from stages.teacher_files.lora.merge import LoraMerge, open_loras

__all__ = ["LoraMerge", "open_loras"]
