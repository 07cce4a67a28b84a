"""YAML to plain values with the line of each key, and plain values to YAML. It knows no key of a config."""

import json
import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from sana_cli.runtime import textfile

MAX_DEPTH = 20  # of YAML: PyYAML's time grows with the square of it


def yaml_value(value: Any) -> str:
    """A value on one line; JSON's quoting is YAML's too."""
    if isinstance(value, str) and ("\n" in value or not value):
        return json.dumps(value, ensure_ascii=_LINE_BREAKS_OF_YAML.search(value) is not None)
    return (
        yaml.dump(value, Dumper=Dumper, default_flow_style=True, allow_unicode=True, width=10**6)
        .removesuffix("...\n")
        .strip()
    )


@dataclass
class Document:
    """Plain values of a YAML file, the line of each key (`file:line`), and what is wrong with it."""

    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[tuple[str, ...], str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 with everyday numbers: `1e-4` is one, `010` is ten, `1:30` and 2001-01-01 are text."""

    def construct_integer(self, node: yaml.ScalarNode) -> int:
        """Decimal, leading zeros or not, or hexadecimal."""
        text = node.value.replace("_", "")
        return int(text, 16 if "x" in text else 10)


_NUMBERS = {
    "tag:yaml.org,2002:int": r"[-+]?(0x[\da-fA-F_]+|\d[\d_]*)",
    "tag:yaml.org,2002:float": r"[-+]?(\d[\d_]*\.[\d_]*([eE][-+]?\d+)?|\.\d[\d_]*([eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.(inf|Inf|INF))|\.(nan|NaN|NAN)",
}
_OTHERS = {*_NUMBERS, "tag:yaml.org,2002:timestamp"}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _OTHERS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in _NUMBERS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(f"^({_pattern})$"), list("-+.0123456789"))
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_integer)


class Dumper(yaml.SafeDumper):
    """Text with characters that only YAML takes for line breaks is in double quotes, where they are escaped."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    number = any(
        re.fullmatch(pattern, text) for pattern in _NUMBERS.values()
    )  # PyYAML's dumper knows fewer of them
    style = '"' if number or _LINE_BREAKS_OF_YAML.search(text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


Dumper.add_representer(str, _represent_text)
_LINE_BREAKS_OF_YAML = re.compile("[\x85\u2028\u2029]")  # editors do not: a comment would end there


def parse(text: str, name: str) -> Document:
    """Read YAML into plain values with their lines. Anchors, duplicate keys and tags are problems."""
    document = Document()
    loader: _Loader | None = None
    try:
        loader = _Loader(text)
        refusal = _refusal(text)
        if refusal:
            document.problems.append(f"{name}:{refusal}")
            return document
        root = loader.get_single_node()
        if root is None:
            return document
        if not isinstance(root, yaml.MappingNode):
            kind = "list" if isinstance(root, yaml.SequenceNode) else "value"
            line = root.start_mark.line + 1
            document.problems.append(f"{name}:{line}: expected keys such as `train:`, found a {kind}")
            return document
        document.values = _plain(loader, root, (), name, document)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        document.problems.append(f"{name}:{line}: not YAML: {error.problem}")
    except yaml.YAMLError as error:
        document.problems.append(f"{name}:1: not YAML: {str(error).splitlines()[0]}")
    finally:
        if loader is not None:
            loader.dispose()
    return document


def _refusal(text: str) -> str:
    """Why text is refused before parsing: aliases expand without end, deep nesting takes quadratic time."""
    odd = _LINE_BREAKS_OF_YAML.search(text)
    if odd:
        line = len(textfile.split_lines(text[: odd.start()] + "."))
        return (
            f"{line}: not YAML as others read it: the character U+{ord(odd[0]):04X} ends a line for YAML alone; "
            f"write it in double quotes, as \\u{ord(odd[0]):04x}"
        )
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1 if event.start_mark else 1
        if isinstance(event, yaml.AliasEvent):
            return f"{line}: YAML aliases are not used in configs; write it out"
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            return f"{line}: nested too deeply to be a config"
    return ""


def _plain(loader: _Loader, node: yaml.Node, at: tuple[str, ...], name: str, document: Document) -> Any:
    if not isinstance(node, yaml.ScalarNode) and node.tag not in (
        "tag:yaml.org,2002:map",
        "tag:yaml.org,2002:seq",
    ):
        document.problems.append(
            f"{name}:{node.start_mark.line + 1}: the tag {node.tag} is not used in configs"
        )
        return None
    if isinstance(node, yaml.MappingNode):
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                document.problems.append(f"{name}:{line}: a key must be a word")
                continue
            key = key_node.value
            path = (*at, key)
            if key in values:
                document.problems.append(f"{name}:{line}: {'.'.join(path)} is given twice; keep one")
            document.lines[path] = f"{name}:{line}"
            values[key] = _plain(loader, value_node, path, name, document)
        return values
    if isinstance(node, yaml.SequenceNode):
        return [_plain(loader, child, at, name, document) for child in node.value]
    try:
        return loader.construct_object(node)
    except (
        yaml.YAMLError,
        ValueError,
        LookupError,
        ArithmeticError,
        AttributeError,
        TypeError,
    ) as error:  # a bad tag
        problem = (
            getattr(error, "problem", None)
            or f"{node.value!r:.60} is not a valid {node.tag.rpartition(':')[2]}"
        )
        document.problems.append(f"{name}:{node.start_mark.line + 1}: {'.'.join(at)}: {problem}")
        return None


def is_more_than_a_value(text: str) -> bool:
    """Whether YAML would read only part of the text, and drop the rest as a comment."""
    loader = _Loader(f"value: {text}")
    try:
        root = loader.get_single_node()
        end = root.value[0][1].end_mark.index if isinstance(root, yaml.MappingNode) else 0
    finally:
        loader.dispose()
    return bool(f"value: {text}"[end:].strip())
