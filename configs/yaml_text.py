"""The allowed YAML: strings, numbers, lists and mappings of one document, of bounded size, without duplicate keys."""

import re
from pathlib import Path
from typing import Any

import yaml

from stages.system.refusal import Refused, first_invalid_character, format_value, invalid_character_reason
from stages.system.text import read_clean_text

MAX_BYTES = 1 << 22
MAX_NODES = 200_000  # each counted as often as an alias repeats it
MAX_DEPTH = 60
TAG_PREFIX = "tag:yaml.org,2002:"
MERGE_TAG = f"{TAG_PREFIX}merge"
ALLOWED_TAGS = {f"{TAG_PREFIX}{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map", "merge")}
KEY_TAGS = {f"{TAG_PREFIX}str", f"{TAG_PREFIX}int"}
INTEGER_LIMIT = 1 << 64
AMBIGUOUS_NUMBER = re.compile(r"[-+]?0[0-9_]+|.*:.*")
"""Numbers that YAML 1.1 reads as octal or in base 60."""
LINE_ENDS = re.compile("[\u2028\u2029]")  # of YAML 1.1 only


def read_yaml(path: Path, name: str, hint: str) -> Any:
    """The content of a YAML file; raises `Refused`, calling it `name`, with the line of the first error."""
    return parse_yaml(read_clean_text(path, name, hint, MAX_BYTES), name)


def parse_yaml(text: str, name: str) -> Any:
    """The value of a YAML text; raises `Refused`, calling it `name`, with the line of the first error."""
    if match := LINE_ENDS.search(text):
        line = text.count("\n", 0, match.start()) + 1
        raise Refused(f"{name}:{line}: not good YAML: a line separator (U+{ord(match.group()):04X}) - remove it")
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}" if mark else name
        parts = [error.context, error.problem] if str(error.problem).startswith("but ") else [error.problem]
        problem = " ".join(", ".join(part for part in parts if part).split())
        raise Refused(f"{where}: not good YAML: {problem}{'' if ' - ' in problem else ' - correct it'}") from error
    except (yaml.YAMLError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError) as error:
        # What the library raises for invalid escapes, directives and explicit tags.
        raise Refused(f"{name}: not good YAML: {format_value(str(error))} - correct it") from error


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which refuses what is ambiguous or unbounded."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._level = 0
        self._extent_of_node: dict[int, tuple[int, int]] = {}
        """id of each finished node -> how many values it holds, and how deep"""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        self._level += 1
        self._refuse_if(self._level > MAX_DEPTH, f"nested more than {MAX_DEPTH} levels deep", event)
        node = super().compose_node(parent, index)
        self._level -= 1
        if node is None:
            return None
        if isinstance(event, yaml.AliasEvent):
            self._refuse_if(id(node) not in self._extent_of_node, f"*{event.anchor} stands within itself", event)
            return node
        self._refuse_if(node.tag not in ALLOWED_TAGS, f"the tag {format_value(node.tag)} is not taken here", node)
        if isinstance(node, yaml.ScalarNode) and (fault := invalid_character_reason(node.value)):
            self._refuse_if(True, f"text {fault} ({first_invalid_character(node.value)})", node)
        if isinstance(node, yaml.MappingNode):
            self._refuse_keys(node)
        self._extent_of_node[id(node)] = self._measure(node)
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        self._refuse_if(
            bool(AMBIGUOUS_NUMBER.fullmatch(node.value)),
            f"{format_value(node.value)} could be read as several numbers - write it without colons and leading zeros, "
            "or in quotes as text",
            node,
        )
        self._refuse_if(len(node.value) > 100, "a number of more than 100 digits", node)
        number: int = super().construct_yaml_int(node)
        self._refuse_if(abs(number) >= INTEGER_LIMIT, f"{number} is too large a number", node)
        return number

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        self._refuse_if(":" in node.value, f"{format_value(node.value)} is no number - write it in quotes", node)
        number: float = super().construct_yaml_float(node)
        return number

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, ArithmeticError, LookupError) as error:
            value = node.value if isinstance(node, yaml.ScalarNode) else "this"
            problem = f"{format_value(value)} is no {node.tag.removeprefix(TAG_PREFIX)}"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from error

    def _refuse_keys(self, node: yaml.MappingNode) -> None:
        """Raise for a key that is no string or integer, and for a duplicate key, however it is spelled."""
        names: set[str] = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else "a list or mapping"
            is_valid = isinstance(key, yaml.ScalarNode) and key.tag in KEY_TAGS | {MERGE_TAG}
            self._refuse_if(not is_valid, f"the key {format_value(name)} is no word - write it in quotes", key)
            name = str(self.construct_object(key)) if key.tag in KEY_TAGS else name
            self._refuse_if(name in names, f"{format_value(name)} is a duplicate key - remove one", key)
            names.add(name)

    def _measure(self, node: yaml.Node) -> tuple[int, int]:
        """How many values a node holds, and how deep; raises when it is too much of either."""
        inner: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            inner = node.value
        elif isinstance(node, yaml.MappingNode):
            inner = [item for pair in node.value for item in pair]
        counts, depths = zip((0, 0), *(self._extent_of_node[id(item)] for item in inner), strict=True)
        count, depth = 1 + sum(counts), 1 + max(depths)
        self._refuse_if(count > MAX_NODES, f"more than {MAX_NODES:,} values, each alias counted in full", node)
        self._refuse_if(depth > MAX_DEPTH, f"nested more than {MAX_DEPTH} levels deep", node)
        return count, depth

    @staticmethod
    def _refuse_if(is_wrong: bool, problem: str, place: Any) -> None:
        if is_wrong:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=place.start_mark)


_Loader.add_constructor(f"{TAG_PREFIX}int", _Loader.construct_yaml_int)
_Loader.add_constructor(f"{TAG_PREFIX}float", _Loader.construct_yaml_float)
# Dates are text: YAML would fail on the 32nd of a month.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if tag != f"{TAG_PREFIX}timestamp"]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
