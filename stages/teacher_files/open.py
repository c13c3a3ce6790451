"""The one door for teachers: whatever a user names becomes a diffusers folder of this machine."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from stages.flow.schedule import NoiseSchedule
from stages.system.refusal import Refused
from stages.teacher_files.architecture import PART_NAMES, check_matching_configs
from stages.teacher_files.base import open_base
from stages.teacher_files.changes import apply_clip_skip, apply_loras, apply_vae
from stages.teacher_files.compose import SourceFile, compose, is_whole
from stages.teacher_files.folder import component_digests, component_files, file_digest
from stages.teacher_files.mix import apply_mix
from stages.teacher_files.schedule import apply_schedule
from stages.teacher_files.source import TeacherSource
from stages.teacher_files.variants import WEIGHT_FILES


@dataclass(frozen=True)
class TeacherFolder:
    """A teacher as a diffusers folder of this machine."""

    location: str
    """As the user named it."""
    folder: Path
    source: TeacherSource
    """What it was opened from."""
    notes: tuple[str, ...] = ()
    """Lines for the user: which variant was taken, what was composed and where."""
    stated: Mapping[str, Any] = field(default_factory=dict)
    """`prediction_type` and `zero_terminal_snr`, where the folder or the file itself states them."""
    composed_digests: Mapping[str, str] | None = None
    """Of a folder that was composed."""
    composed_sources: tuple[SourceFile, ...] = ()

    @cached_property
    def digests(self) -> Mapping[str, str]:
        """Component -> sha256: its identity, which depends on contents and options and on no name or place."""
        return component_digests(self.folder) if self.composed_digests is None else self.composed_digests

    @cached_property
    def sources(self) -> tuple[SourceFile, ...]:
        """The files that its weights come from."""
        if self.composed_digests is not None:
            return self.composed_sources
        weights = [(part, file) for part in WEIGHT_FILES for file in component_files(self.folder, part)[1:]]
        return tuple(SourceFile(part, file.absolute(), file_digest(file)) for part, file in weights)

    @property
    def is_composed(self) -> bool:
        """Whether its folder lies in the user's cache."""
        return self.composed_digests is not None

    def present_folder(self) -> Path:
        """Its folder, which is composed again where it was deleted or damaged since it was opened.

        Raises `Refused` where the sources are gone or others by now.
        """
        if not self.is_composed or is_whole(self.folder):
            return self.folder
        again = open_teacher_files(self.source)
        if again.folder != self.folder:
            raise Refused(
                f"teacher: {self.location}: its composed folder {self.folder} is gone, and its files are others than "
                "before - put the same files there and start the command again"
            )
        return again.folder


def open_teacher_files(source: TeacherSource, config_option: str = "--teacher.config") -> TeacherFolder:
    """The folder of a teacher: the one that is named, if nothing changes it, else one that is composed in the cache.

    `config_option` is how the user names the configs of a single file. Raises `Refused` for what is no SD-1.x model.
    """
    made = open_base(source, config_option)
    for apply in (apply_vae, apply_mix, apply_loras, apply_clip_skip, apply_schedule):
        apply(source, made)
    if made.folder is not None and not made.changed:
        return TeacherFolder(source.location, made.folder, source, tuple(made.notes), made.stated)
    content = made.composition()
    check_matching_configs({part: (content.parts[part].place, content.parts[part].config) for part in PART_NAMES})
    NoiseSchedule.from_config(content.parts["scheduler"].config)
    folder, is_new = compose(content)
    made.notes.append(f"teacher: {'composed' if is_new else 'already composed'} in {folder}, which may be deleted")
    sources = tuple(content.sources)
    return TeacherFolder(source.location, folder, source, tuple(made.notes), made.stated, content.digests, sources)
