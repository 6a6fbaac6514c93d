"""What is written in a dataclass and below each of its fields, for `--help` and for tables."""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import is_dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any


@lru_cache
def field_docs(schema: Any) -> dict[str, str]:
    """The doc line of each field by its name, inherited ones included; "": it has none."""
    found: dict[str, str] = {}
    for base in reversed(schema.__mro__):
        if is_dataclass(base):
            found |= {name: doc for name, doc in _own(base).items() if doc or name not in found}
    return found


def class_doc(schema: Any) -> str:
    """The docstring of a class, in one line."""
    return " ".join(inspect.cleandoc(schema.__doc__ or "").split())


def _own(schema: Any) -> dict[str, str]:
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(schema))).body
    assert isinstance(tree, ast.ClassDef)
    found: dict[str, str] = {}
    for one, following in pairwise([*tree.body, ast.Pass()]):
        if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name):
            found[one.target.id] = _text(following)
    return found


def _text(following: ast.stmt) -> str:
    if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
        return " ".join(str(following.value.value).split())
    return ""
