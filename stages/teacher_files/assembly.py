"""A teacher while its parts are put together, with the notes about them for the user."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.teacher_files.compose import Composition, SourceFile
from stages.teacher_files.folder import COMPONENT_NAMES, file_digest
from stages.teacher_files.parts import Part


@dataclass
class Assembly:
    """The parts of a teacher, each opened when it is needed: a folder that nothing changes needs none."""

    load: Callable[[str], Part]
    """Opens the part of this name as it was named by the user."""
    configs: Path
    """A diffusers folder with the configs of all parts."""
    model_index: Mapping[str, Any]
    folder: Path | None = None
    """The diffusers folder that it is; None for a single file."""
    card_files: tuple[Path, ...] = ()
    """Card and licence of the model."""
    parts: dict[str, Part] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    sources: list[SourceFile] = field(default_factory=list)
    stated: dict[str, str | bool] = field(default_factory=dict)
    """What its files say of prediction and schedule."""

    def part(self, component: str) -> Part:
        """The component as it is by now."""
        if component not in self.parts:
            self.parts[component] = self.load(component)
        return self.parts[component]

    def put(self, part: Part) -> None:
        """Take another part in the place of the one that is there."""
        self.parts[part.component] = part
        self.changed.add(part.component)

    def add_source(self, role: str, file: Path) -> None:
        """Note a file that parts come from."""
        self.sources.append(SourceFile(role, file.absolute(), file_digest(file)))

    def composition(self) -> Composition:
        """What the composed folder will hold."""
        parts = {component: self.part(component) for component in COMPONENT_NAMES}
        return Composition(parts, self._index(parts), self._all_sources(parts), self.card_files)

    def _index(self, parts: Mapping[str, Part]) -> dict[str, Any]:
        """The index of the composed folder: the parts that it has, and no others."""
        entries = {name: value for name, value in self.model_index.items() if isinstance(value, list)}
        others = {name: [None, None] for name in entries.keys() - set(COMPONENT_NAMES)}
        scheduler = ["diffusers", parts["scheduler"].config.get("_class_name", "DDIMScheduler")]
        head = {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False}
        return {**entries, **others, "scheduler": scheduler, **head}

    def _all_sources(self, parts: Mapping[str, Part]) -> list[SourceFile]:
        """Noted files, and the weights of parts that lie in folders."""
        known = {source.path for source in self.sources}
        files = [(name, file.absolute()) for name, part in parts.items() for file in part.weight_files]
        return self.sources + [SourceFile(name, file, file_digest(file)) for name, file in files if file not in known]
