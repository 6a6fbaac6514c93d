"""YAML as plain data: mappings, lists, text, numbers, true and false, null.

Nothing in it is looked up, resolved or run: `${...}`, `???` and the like are text. Depth, size and
what aliases stand for are bounded before anything is built, because the file may be anybody's.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import yaml
from yaml.composer import Composer
from yaml.constructor import SafeConstructor
from yaml.cyaml import CParser  # pyright: ignore[reportAttributeAccessIssue]
from yaml.parser import Parser
from yaml.reader import Reader
from yaml.resolver import Resolver
from yaml.scanner import Scanner

from simvq_moe.files.regular import BrokenFileError, read_text

SIZE = 2**20
"""Bytes of a file of YAML that are read at most: 1 MiB."""
DEPTH = 50
"""Mappings and lists within each other at most."""
VALUES = 100_000
"""Mappings, lists and values at most, each counted again wherever an alias repeats it."""
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]|\\U0000[dD][89a-fA-F]")

NUMBER = r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?"
IMPLICIT = {
    "null": (r"~|null|Null|NULL|", ("~", "n", "N", "")),
    "bool": (r"(?i:yes|no|true|false|on|off)", tuple("yYnNtTfFoO")),
    "int": (r"[-+]?(?:0|[1-9][0-9]*|[1-9][0-9]{0,2}(?:_[0-9]{3})+)", tuple("-+0123456789")),
    "float": (
        rf"{NUMBER}|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        tuple("-+0123456789."),
    ),
    "merge": (r"<<", ("<",)),
}
"""What is no text without quotes, by its pattern and its first characters: YAML 1.1 without dates
and without numbers in base 8, 16 and 60, but with 3e-4 as a number. Integers may have their
thousands apart, as in 8_192; 2026_11_30 is text, because it would be another name as a number."""


def read_yaml(path: Path, *, inside: Path | None = None) -> dict[str, Any]:
    """The mapping that a YAML file holds; an empty file holds an empty one.

    Args:
        inside: folder that the file must lie in once links are followed; None: anywhere.

    Raises:
        MissingFileError: there is no such file.
        BrokenFileError: it is no plain YAML, no mapping, too deep or too large.
    """
    content = parse_yaml(read_text(path, limit=SIZE, inside=inside), path)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise BrokenFileError(path, f"must hold keys and values, not a {type(content).__name__}")
    return content


def parse_yaml(text: str, where: Path | str) -> Any:
    """What a text in YAML says; keys are always text.

    Args:
        where: names the text in an error.

    Raises:
        BrokenFileError: it is no plain YAML, too deep or too large.
    """
    try:
        loader = (_SurrogateLoader if SURROGATE.search(text) else _FastLoader)(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        # ValueError: integers of thousands of digits; both: escapes of no character
        raise BrokenFileError(
            where, f"is not readable YAML: {' '.join(str(error).split())}"
        ) from None


def plain_yaml(content: Mapping[str, Any]) -> str:
    """YAML that `parse_yaml` reads back to equal nested mappings, lists and values."""
    return yaml.dump(
        dict(content),
        Dumper=_Dumper,
        default_flow_style=False,
        allow_unicode=True,
        sort_keys=False,
        width=sys.maxsize,
    )


class _Loader(Composer, SafeConstructor, Resolver):
    """Plain values alone, counted while the tree of nodes is composed."""

    peek_event: Callable[[], Any]
    """The next event of the parser."""
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self) -> None:
        for base in (Composer, SafeConstructor, Resolver):
            base.__init__(self)
        self.depth, self.values = 0, 0
        self.values_of: dict[int, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if getattr(event, "tag", None) is not None:
            raise yaml.YAMLError(f"tag {event.tag}{event.start_mark}: plain values have none")
        before = self.values
        self.depth += 1
        if self.depth > DEPTH:
            raise yaml.YAMLError(f"more than {DEPTH} levels{event.start_mark}")
        node = super().compose_node(parent, index)
        self.depth -= 1
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self.values_of:
                raise yaml.YAMLError(f"*{event.anchor} stands within itself{event.start_mark}")
            self.values += self.values_of[id(node)]
        else:
            self.values += 1
            self.values_of[id(node)] = self.values - before
        if self.values > VALUES:
            raise yaml.YAMLError(f"more than {VALUES:,} values, with what aliases stand for")
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = set()  # looked at here, because a merge puts the keys of others into the node
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.YAMLError(f"a key that is no text{key.start_mark}")
            if key.value in keys and key.tag != MERGE:
                raise yaml.YAMLError(f"key {key.value} twice{key.start_mark}")
            keys.add(key.value)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        self.flatten_mapping(node)
        return {key.value: self.construct_object(value, deep=deep) for key, value in node.value}


class _FastLoader(_Loader, CParser):
    """Takes a fifth of the time, by libyaml."""

    def __init__(self, text: str) -> None:
        CParser.__init__(self, text)
        _Loader.__init__(self)


class _SurrogateLoader(_Loader, Reader, Scanner, Parser):
    """Reads surrogates, which stand in names of files that are no UTF-8; libyaml refuses them."""

    def __init__(self, text: str) -> None:
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        _Loader.__init__(self)


class _Dumper(yaml.SafeDumper):
    """Quotes whatever any reader of YAML would not take for text."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        # within single quotes a reader makes one kind of line end of them all
        style = None if text.isprintable() else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


MERGE = "tag:yaml.org,2002:merge"
_Dumper.add_representer(str, _Dumper.represent_text)
for kind, (pattern, first) in IMPLICIT.items():
    for resolver in (_Loader, _Dumper):
        resolver.add_implicit_resolver(
            f"tag:yaml.org,2002:{kind}",
            re.compile(rf"(?:{pattern})\Z"),
            first,
        )
