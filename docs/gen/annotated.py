"""Reads the comments of configuration files and of the fields of classes, for the reference pages.

A comment describes the key on its line, or the key below it. The first comment of a file describes
the file. An indented line (`#   averaged: ...`) is an item of its own.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import io
import json
import tokenize
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

TARGET = "_target_"
ITEM = 3  # blanks before an item: "#   averaged: ..."


@dataclass(frozen=True, kw_only=True)
class Key:
    """One key of a configuration file."""

    path: str  # "editor.target.steps" without the group: "target.steps"
    value: str  # as the file has it, on one line; "" where further keys follow
    comment: str
    data: Any


@dataclass(frozen=True, kw_only=True)
class ConfigFile:
    """A configuration file: its first comment line, the lines after it, its defaults list and its
    keys.
    """

    path: Path
    about: str
    notes: str
    defaults: tuple[Any, ...]
    keys: tuple[Key, ...]

    @property
    def targets(self) -> dict[str, str]:
        """The class of each node: its path ("" for the file itself) -> dotted name."""
        return {
            key.path.rpartition(".")[0]: str(key.data)
            for key in self.keys
            if key.path.rpartition(".")[2] == TARGET
        }


def read(path: Path) -> ConfigFile:
    text = path.read_text()
    lines = text.splitlines()
    comments, head = comments_by_line(lines, ends_of_tokens(text))
    root = yaml.compose(text)
    keys: list[Key] = []
    data = yaml.safe_load(text) or {}
    if isinstance(root, yaml.MappingNode):
        keys += walk(root, data, "", comments)
    return ConfigFile(
        path=path,
        about=head[0] if head else "",
        notes=" ".join(head[1:]),
        defaults=tuple(data.get("defaults", ())),
        keys=tuple(key for key in keys if not key.path.startswith("defaults")),
    )


def ends_of_tokens(text: str) -> dict[int, int]:
    """The column behind the last token of each line; what follows it can only be a comment."""
    ends: dict[int, int] = {}
    for token in yaml.scan(text):
        if token.end_mark.index > token.start_mark.index:
            line, column = token.end_mark.line, token.end_mark.column
            ends[line] = max(ends.get(line, 0), column)
    return ends


def comments_by_line(lines: list[str], ends: dict[int, int]) -> tuple[dict[int, str], list[str]]:
    """The comment of each line that holds tokens, and the comment lines at the top of the file."""
    comments: dict[int, str] = {}
    head: list[str] = []
    above = ""
    for number, line in enumerate(lines):
        if number in ends:
            _, _, own = line[ends[number] :].partition("#")
            comments[number] = added(above, own)
            above = ""
        elif line.strip().startswith("#"):
            text = line.strip()[1:]
            if not text.strip().startswith("@package"):
                if comments:
                    above = added(above, text)
                else:
                    head.append(text.strip())
    return {number: comment for number, comment in comments.items() if comment}, head


def added(comment: str, line: str) -> str:
    """A comment with one more line: an indented one begins an item, a deeper one continues it."""
    text = line.strip()
    indent = len(line) - len(line.lstrip())
    if not comment or not text:
        return comment or text
    return f"{comment}\n{text}" if indent == ITEM else f"{comment} {text}"


def walk(node: yaml.MappingNode, data: Any, prefix: str, comments: dict[int, str]) -> Iterator[Key]:
    for key, value in node.value:
        path = f"{prefix}{key.value}"
        inner = data[yaml.safe_load(key.value) if key.value not in data else key.value]
        nested = isinstance(value, yaml.MappingNode) and not value.flow_style and value.value
        yield Key(
            path=path,
            value="" if nested else shown(inner),
            comment=comments.get(key.start_mark.line, ""),
            data=inner,
        )
        if nested:
            yield from walk(value, inner, f"{path}.", comments)


def shown(value: Any) -> str:
    """A value as a person would write it on the command line or in a file."""
    if isinstance(value, str):
        return value if value and value.strip() == value and "\n" not in value else repr(value)
    dumped = yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False)
    text = dumped.removesuffix("...\n").strip()
    return json.dumps(value) if "\n" in text else text  # yaml breaks a line within a value


def field_comments(target: type) -> dict[str, str]:
    """The comment of each field that a dataclass or one of its bases declares."""
    comments: dict[str, str] = {}
    for base in reversed(target.__mro__):
        if base is not object and dataclasses.is_dataclass(base):
            comments |= own_field_comments(base)
    return comments


def own_field_comments(target: type) -> dict[str, str]:
    try:
        source = inspect.getsource(target)
    except (OSError, TypeError):
        return {}
    source = inspect.cleandoc(source) if source.startswith(" ") else source
    by_line = {
        token.start[0]: token.string.lstrip("# ").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    comments, before = {}, definition.lineno
    for statement in definition.body:
        end = statement.end_lineno or statement.lineno
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            lines = [by_line[line] for line in range(before + 1, end + 1) if line in by_line]
            comments[statement.target.id] = " ".join(lines)
        before = end
    return comments


def located(name: str) -> type | None:
    """The class of a dotted name."""
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError):
        return None
    return found if isinstance(found, type) else None


def field_comment(target: type, path: str) -> str:
    """The comment of the field at a path such as `target.steps`, through nested dataclasses."""
    name, _, rest = path.partition(".")
    if not rest:
        return field_comments(target).get(name, "")
    try:
        inner = typing.get_type_hints(target).get(name)
    except (NameError, AttributeError):
        return ""
    for candidate in (inner, *typing.get_args(inner)):
        if isinstance(candidate, type) and dataclasses.is_dataclass(candidate):
            return field_comment(candidate, rest)
    return ""
