"""Python blocks compile; what a page marks as runnable is executed, page by page."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, RUNNABLE, Block, blocks, name_of
from tests.support.paths import ROOT

RUNNABLE_PAGES = [page for page in PAGES if any(each.note == RUNNABLE for each in blocks(page))]
PYTHON = [each for page in PAGES for each in blocks(page) if each.language == "python"]
PREAMBLE = "set -euo pipefail\n"


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: name_of(block.page))
def test_a_python_block_compiles(block: Block) -> None:
    compile(block.text, name_of(block.page), "exec")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.slow
@pytest.mark.parametrize("page", RUNNABLE_PAGES, ids=name_of)
def test_a_page_runs_from_an_empty_folder(page: Path, tmp_path: Path, cache: Path) -> None:
    execute(page, tmp_path, cache)


def test_the_first_python_example_runs(tmp_path: Path, cache: Path) -> None:
    execute(ROOT / "README.md", tmp_path, cache)


OUTPUTS = [each for page in PAGES for each in blocks(page) if each.note.startswith("output: ")]


@pytest.mark.parametrize("block", OUTPUTS, ids=lambda block: block.note)
def test_a_shown_output_is_what_the_command_prints(block: Block, tmp_path: Path) -> None:
    for other in blocks(block.page):
        if other.file:
            (tmp_path / other.file).write_text(other.text)
    words = shlex.split(block.note.removeprefix("output: editkit "))
    done = subprocess.run(
        [sys.executable, "-m", "editkit", *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert block.text.split() == (done.stdout + done.stderr).split()


def execute(page: Path, folder: Path, cache: Path) -> None:
    """Writes the page's files, then runs its shell blocks in order, then its Python blocks."""
    shell, python = PREAMBLE, ""
    for block in blocks(page):
        if block.file:
            (folder / block.file).parent.mkdir(parents=True, exist_ok=True)
            (folder / block.file).write_text(block.text)
        elif block.note == RUNNABLE and block.language == "python":
            python += block.text
        elif block.note == RUNNABLE:
            shell += block.text
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "EDITKIT_CACHE": str(cache),
        "OMP_NUM_THREADS": "2",
    }
    for program in (["bash", "-c", shell], [sys.executable, "-c", python]):
        done = subprocess.run(
            program, cwd=folder, env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
