"""Ratchets: what keeps the code small and its edges clean. Raise none of them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import PACKAGE, ROOT

SOURCES = sorted(path for path in PACKAGE.rglob("*.py"))
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
# A line of code was 140 columns wide and is 100 now, which made the tests a third longer.
MOST_LINES_OF_A_TEST = 620


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [*SOURCES, *SCRIPTS], ids=name)
def test_no_file_exceeds_400_lines(path: Path) -> None:
    num_lines = len(path.read_text().splitlines())
    assert num_lines <= 400, f"{num_lines} lines"


@pytest.mark.parametrize("path", TESTS, ids=name)
def test_no_test_file_exceeds_its_limit(path: Path) -> None:
    num_lines = len(path.read_text().splitlines())
    assert num_lines <= MOST_LINES_OF_A_TEST, f"{num_lines} lines"


def test_the_readme_fits_on_a_few_screens() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 130


@pytest.mark.parametrize("folder", ["editkit", "conf", "scripts", "experiments"])
def test_nothing_refers_to_a_document_that_is_not_in_the_repository(folder: str) -> None:
    files = [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".yaml", ".md")]
    assert files
    assert not [name(path) for path in files if "DESIGN" in path.read_text()]


def test_the_loop_of_the_runner_stays_below_200_lines() -> None:
    assert len((PACKAGE / "runner" / "loop.py").read_text().splitlines()) < 200


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_the_package_neither_prints_nor_imports_everything_of_a_module(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", (
                f"line {node.lineno}: trackers show things, and logging warns"
            )
        if isinstance(node, ast.ImportFrom):
            assert [alias.name for alias in node.names] != ["*"], f"line {node.lineno}"


HEAVY = {
    "torch",
    "transformers",
    "datasets",
    "matplotlib",
    "pandas",
    "safetensors",
    "accelerate",
    "plotly",
    "scipy",
    "wandb",
    "pyarrow",
}


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_heavy_libraries_are_imported_inside_functions_only(path: Path) -> None:
    imported = {
        module.partition(".")[0]
        for module in imported_at_module_level(ast.parse(path.read_text()).body)
    }
    assert not imported & HEAVY or path.name == "lazy.py"


def imported_at_module_level(statements: list[ast.stmt]) -> Iterator[str]:
    """Modules that importing a file imports; what stands under `if TYPE_CHECKING` is for the type
    checker alone.
    """
    for statement in statements:
        if isinstance(statement, ast.Import):
            yield from (alias.name for alias in statement.names)
        elif isinstance(statement, ast.ImportFrom):
            yield statement.module or ""
        elif isinstance(statement, ast.If) and not (
            isinstance(statement.test, ast.Name) and statement.test.id == "TYPE_CHECKING"
        ):
            yield from imported_at_module_level([*statement.body, *statement.orelse])
        elif isinstance(statement, ast.ClassDef | ast.Try | ast.With):
            yield from imported_at_module_level(statement.body)


def test_nothing_is_pickled_and_only_tensors_are_unpickled() -> None:
    for path in SOURCES:
        source = path.read_text()
        assert "import pickle" not in source and "torch.save" not in source, name(path)
        loads = re.findall(r"torch\.load\((.*)\)", source)
        assert len(loads) == source.count("torch.load"), name(path)
        assert all(call.endswith("weights_only=True") for call in loads), name(path)
