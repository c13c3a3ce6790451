"""Fine-tunes of a teacher mixed into it: which models fit, how far they are from it, and the arithmetic."""

from stages.teacher_files.mix.apply import apply_mix

__all__ = ["apply_mix"]
