"""YAML as it may be written here: plain words, numbers, lists and mappings of one document, and nothing twice."""

import re
from pathlib import Path
from typing import Any

import yaml

from stages.system.refusal import Refused, first_invalid_character, format_value, invalid_character_reason
from stages.system.text import read_clean_text

MAX_BYTES = 1 << 22
MAX_NODES = 200_000
"""Values of a file, each counted as often as an alias repeats it."""
MAX_DEPTH = 60
TAG_PREFIX = "tag:yaml.org,2002:"
MERGE_TAG = f"{TAG_PREFIX}merge"
ALLOWED_TAGS = {f"{TAG_PREFIX}{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map", "merge")}
KEY_TAGS = {f"{TAG_PREFIX}str", f"{TAG_PREFIX}int"}
INTEGER_LIMIT = 1 << 64
AMBIGUOUS_NUMBER = re.compile(r"[-+]?0[0-9_]+|.*:.*")
"""Numbers that YAML 1.1 reads as octal or to the base of 60."""
LINE_ENDS = re.compile("[\u2028\u2029]")
"""They end a line for YAML 1.1, and for nobody else."""


def read_yaml(path: Path, name: str, hint: str) -> Any:
    """The content of a YAML file; raises `Refused`, calling it `name`, with the line of the first slip."""
    return parse_yaml(read_clean_text(path, name, hint, MAX_BYTES), name)


def parse_yaml(text: str, name: str) -> Any:
    """The value of a YAML text; raises `Refused`, calling it `name`, with the line of the first slip."""
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
        # All that the library lets pass of escapes, directives and explicit tags that mean nothing.
        raise Refused(f"{name}: not good YAML: {format_value(str(error))} - correct it") from error


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which refuses whatever could be read in two ways or without an end."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._level = 0
        self._extent_of_node: dict[int, tuple[int, int]] = {}
        """of each finished node: how many values it stands for, and how deep they lie"""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        self._level += 1
        self._refuse_if(self._level > MAX_DEPTH, f"nested more than {MAX_DEPTH} levels deep", event.start_mark)
        node = super().compose_node(parent, index)
        self._level -= 1
        if node is None:
            return None
        if isinstance(event, yaml.AliasEvent):
            self._refuse_if(
                id(node) not in self._extent_of_node, f"*{event.anchor} stands within itself", event.start_mark
            )
            return node
        self._refuse_if(
            node.tag not in ALLOWED_TAGS, f"the tag {format_value(node.tag)} is not taken here", node.start_mark
        )
        if isinstance(node, yaml.ScalarNode) and (fault := invalid_character_reason(node.value)):
            self._refuse_if(True, f"text {fault} ({first_invalid_character(node.value)})", node.start_mark)
        if isinstance(node, yaml.MappingNode):
            self._refuse_keys(node)
        self._extent_of_node[id(node)] = self._measure(node)
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        self._refuse_if(
            bool(AMBIGUOUS_NUMBER.fullmatch(node.value)),
            f"{format_value(node.value)} could be read as several numbers - write it without colons and leading zeros, "
            "or in quotes as text",
            node.start_mark,
        )
        self._refuse_if(len(node.value) > 100, "a number of more than 100 digits", node.start_mark)
        number: int = super().construct_yaml_int(node)
        self._refuse_if(abs(number) >= INTEGER_LIMIT, f"{number} is too large a number", node.start_mark)
        return number

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        self._refuse_if(
            ":" in node.value, f"{format_value(node.value)} is no number - write it in quotes", node.start_mark
        )
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
        """Raise for a key that is no word or number, and for one that is said twice, however it is spelt."""
        seen: set[str] = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else "a list or mapping"
            fit = isinstance(key, yaml.ScalarNode) and key.tag in KEY_TAGS | {MERGE_TAG}
            self._refuse_if(not fit, f"the key {format_value(name)} is no word - write it in quotes", key.start_mark)
            meaning = str(self.construct_object(key)) if key.tag in KEY_TAGS else name
            self._refuse_if(meaning in seen, f"{format_value(meaning)} is said twice - remove one", key.start_mark)
            seen.add(meaning)

    def _measure(self, node: yaml.Node) -> tuple[int, int]:
        """How many values a node stands for, and how deep they lie; raises when it is too much of either."""
        inner: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            inner = node.value
        elif isinstance(node, yaml.MappingNode):
            inner = [part for pair in node.value for part in pair]
        extents = [self._extent_of_node[id(one)] for one in inner]
        values, depth = 1 + sum(one[0] for one in extents), 1 + max((one[1] for one in extents), default=0)
        self._refuse_if(
            values > MAX_NODES, f"more than {MAX_NODES:,} values, each alias counted in full", node.start_mark
        )
        self._refuse_if(depth > MAX_DEPTH, f"nested more than {MAX_DEPTH} levels deep", node.start_mark)
        return values, depth

    @staticmethod
    def _refuse_if(wrong: bool, problem: str, mark: Any) -> None:
        if wrong:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


_Loader.add_constructor(f"{TAG_PREFIX}int", _Loader.construct_yaml_int)
_Loader.add_constructor(f"{TAG_PREFIX}float", _Loader.construct_yaml_float)
# Nothing here is a date: what looks like one is text, and YAML would stumble over the 32nd of a month.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if tag != f"{TAG_PREFIX}timestamp"]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
