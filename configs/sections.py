"""A configuration file: a YAML mapping with one top-level section for each command."""

from pathlib import Path
from typing import Any

from configs.characters import printable
from configs.refusal import Refused, did_you_mean
from configs.yaml_text import read_yaml

SECTIONS = (
    "cache_teacher", "distill", "finetune_classes", "evaluate", "sample", "import", "export", "publish",
)  # fmt: skip


def read_section(file: Path, section: str) -> dict[str, Any]:
    """The values of one section of `file`; nothing when the file does not speak of it."""
    content = _content(file)
    for name, values in content.items():
        if name not in SECTIONS:
            raise Refused(f"{file}: {printable(name)}: unknown section - {did_you_mean(str(name), SECTIONS)}")
        if not isinstance(values, dict | None):
            raise Refused(f"{file}: {name} = {printable(values)}: should be a mapping of keys to values")
    return content.get(section) or {}


def _content(file: Path) -> dict[Any, Any]:
    content = read_yaml(file, str(file), "--config takes YAML files")
    if not isinstance(content, dict | None):
        raise Refused(f"{file}: should be a mapping of sections ({', '.join(SECTIONS)})")
    return content or {}
