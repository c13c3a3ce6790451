"""A configuration file: a YAML mapping with one top-level section for each command."""

from pathlib import Path
from typing import Any

import yaml

from configs.refusal import Refused, did_you_mean

SECTIONS = (
    "cache_teacher", "distill", "finetune_classes", "evaluate", "sample", "import", "export", "publish",
)  # fmt: skip


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which refuses a key said twice where YAML would silently keep the later one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.MarkedYAMLError(problem=f"{key.value} is said twice", problem_mark=key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def read_section(file: Path, section: str) -> dict[str, Any]:
    """The values of one section of `file`; nothing when the file does not speak of it."""
    content = _content(file)
    for name, values in content.items():
        if name not in SECTIONS:
            raise Refused(f"{file}: {name}: unknown section - {did_you_mean(str(name), SECTIONS)}")
        if not isinstance(values, dict | None):
            raise Refused(f"{file}: {name} = {values!r}: should be a mapping of keys to values")
    return content.get(section) or {}


def _content(file: Path) -> dict[Any, Any]:
    try:
        with open(file, encoding="utf-8") as stream:
            content = yaml.load(stream, _Loader)
    except OSError as error:
        raise Refused(f"{file}: cannot be read ({error.strerror}) - --config takes YAML files") from error
    except UnicodeDecodeError as error:
        raise Refused(f"{file}: not a text file ({error.reason}) - --config takes YAML files") from error
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise Refused(f"{file}{line}: not good YAML: {error.problem}") from error
    if not isinstance(content, dict | None):
        raise Refused(f"{file}: should be a mapping of sections ({', '.join(SECTIONS)})")
    return content or {}
