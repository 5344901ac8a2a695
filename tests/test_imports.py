"""Imports point down (DESIGN section 3), and nothing that should be quick loads torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "editkit"

# From the bottom up; a file may import from its own layer and from those before it.
LAYERS = (
    {"__init__", "types", "errors", "lazy", "files", "inputs", "lock", "signals", "timing", "peak", "schedule", "linalg"},
    {"model", "stats", "targets", "hypernet"},
    {"editors", "restraints", "datasets", "evaluation"},
    {"lengths", "state", "trajectory", "views", "runner"},
    {"schema", "compose", "experiment", "build", "trackers", "report", "provenance", "export", "bench", "memory", "footprint"},
    {"session", "training"},
    {"sweeps"},
    {"application", "commands", "cli", "__main__"},
)
# The world's text is generated, without a model or a request: the one thing that statistics take from a dataset.
ALLOWED = {("stats", "datasets")}
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
SOURCES = sorted(PACKAGE.rglob("*.py"))


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def run_time_imports(tree: ast.Module) -> Iterator[str]:
    """First parts below `editkit` of everything imported, also inside functions, but not for the type checker alone."""
    ignored = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in ignored:
            continue
        if isinstance(node, ast.ImportFrom) and node.module == "editkit":
            yield from (alias.name for alias in node.names if alias.name in LEVEL)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("editkit."):
            yield (node.module or "").split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("editkit."))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_only_point_down(path: Path) -> None:
    here = part(path)
    assert here in LEVEL, f"say in LAYERS where editkit/{here} belongs"
    above = {name for name in run_time_imports(ast.parse(path.read_text())) if LEVEL[name] > LEVEL[here] and (here, name) not in ALLOWED}
    assert not above


def loaded_after(code: str) -> set[str]:
    """Which heavy modules a fresh interpreter holds after running that code."""
    watched = "torch transformers datasets matplotlib pandas numpy safetensors"
    probe = f"import sys\n{code}\nsys.stderr.write('LOADED ' + ' '.join(name for name in {watched!r}.split() if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=120, check=False)
    assert "LOADED" in done.stderr, done.stderr
    return set(done.stderr.rpartition("LOADED")[2].split())


def test_importing_every_configurable_class_loads_neither_torch_nor_transformers() -> None:
    modules = [
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        for path in SOURCES
        if path.name not in ("__init__.py", "__main__.py")
    ]
    assert not loaded_after("import importlib\n" + "\n".join(f"importlib.import_module({module!r})" for module in modules))


@pytest.mark.parametrize(
    "arguments", [["ls"], ["--help"], ["run", "--cfg", "job"], ["run", "--help"], ["validate", "edits=3"]], ids=" ".join
)
def test_quick_commands_load_neither_torch_nor_transformers(arguments: list[str]) -> None:
    code = f"""
sys.argv = ['editkit', *{arguments!r}]
from editkit.cli import main
try:
    main()
except SystemExit as left:
    assert not left.code, left.code
"""
    assert not loaded_after(code)
