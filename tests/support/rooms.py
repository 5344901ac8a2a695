"""The rooms of the package and who imports whom: `python -m tests.support.rooms` shows them.

A room is a folder below `editkit/`. The files at the top are the ground that every room stands
on, except `__init__` and `__main__`, which are the roof.
"""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.support.paths import PACKAGE

GROUND, ROOF = "ground", "roof"
IN_THE_ROOF = ("__init__", "__main__")
Graph = Mapping[str, set[str]]


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


def room_of(module: str) -> str:
    _, *inside = module.split(".")
    if not inside or inside[0] in IN_THE_ROOF:
        return ROOF
    return inside[0] if (PACKAGE / inside[0]).is_dir() else GROUND


def imported(tree: ast.Module, known: Mapping[str, Path]) -> Iterator[str]:
    """Every module of the package that a file imports: also in functions and for the type
    checker.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "editkit":
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in known else str(node.module)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("editkit."))


def files_graph() -> dict[str, set[str]]:
    """By module, the modules that it imports; `editkit` itself, which holds the version, apart."""
    known = modules()
    graph = {
        name: set(imported(ast.parse(path.read_text()), known)) - {name}
        for name, path in known.items()
    }
    return {name: below - {"editkit"} for name, below in graph.items()}


def rooms_graph(files: Graph | None = None) -> dict[str, set[str]]:
    """By room, the rooms that it imports."""
    graph: dict[str, set[str]] = {}
    for name, below in (files or files_graph()).items():
        here = room_of(name)
        graph.setdefault(here, set()).update(
            room for each in below if (room := room_of(each)) != here
        )
    return graph


def circle(graph: Graph) -> list[str]:
    """A circle of imports, or nothing."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def floors(graph: Graph) -> dict[str, int]:
    """How high each room stands: one above the highest that it imports. For a graph without
    circles.
    """
    found: dict[str, int] = {}
    for room in graphlib.TopologicalSorter(graph).static_order():
        found[room] = 1 + max((found[below] for below in graph.get(room, ())), default=0)
    return found


def loose_files() -> list[str]:
    return sorted(path.name for path in PACKAGE.glob("*.py"))


def show() -> str:
    """The figures of the layout, for people."""
    files = files_graph()
    rooms = rooms_graph(files)
    folders = {path.parent for path in modules().values()} - {PACKAGE}
    lines = [
        f"loose files: {len(loose_files())} ({', '.join(loose_files())})",
        f"rooms: {len(rooms) - 2}, with the folders inside them {len(folders)}",
        f"circle of files: {' -> '.join(circle(files)) or 'none'}",
        f"circle of rooms: {' -> '.join(circle(rooms)) or 'none'}",
    ]
    if not circle(rooms):
        heights = floors(rooms)
        lines.append(f"floors: {max(heights.values())}")
        for floor in sorted(set(heights.values())):
            lines.append(
                f"  {floor:2}  {', '.join(sorted(room for room, at in heights.items() if at == floor))}"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    import sys

    sys.stdout.write(show())
