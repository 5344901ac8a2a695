"""What goes into a source distribution and an image."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
from email import message_from_bytes
from pathlib import Path

import pytest
from packaging.metadata import Metadata

from tests.support.paths import ROOT


@pytest.mark.slow
def test_the_sdist_holds_what_a_build_and_the_tests_need(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    (made,) = tmp_path.glob("editkit-*.tar.gz")
    top = made.name.removesuffix(".tar.gz")
    with tarfile.open(made) as archive:
        names = {name.removeprefix(f"{top}/") for name in archive.getnames()}
        described = archive.extractfile(f"{top}/PKG-INFO")
        assert described is not None
        content = described.read()
    tracked = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "conf", "editkit", "hydra_plugins", "experiments"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert len(tracked) > 500 and not set(tracked) - names
    assert {"README.md", "LICENSE", "CHANGELOG.md", "pyproject.toml", "constraints.txt"} <= names
    assert not [name for name in names if re.search(r"(^|/)(\.venv|outputs|\.env)(/|$)", name)]
    # As `twine check`: the fields are valid, and an index shows the description as Markdown.
    Metadata.from_email(content, validate=True)
    parsed = message_from_bytes(content)
    assert parsed["Description-Content-Type"] == "text/markdown"
    assert str(parsed.get_payload()).strip() == (ROOT / "README.md").read_text().strip()


def test_an_image_holds_no_results_caches_or_keys() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert {".git", ".venv", ".env", "outputs", "conf/local/*"} <= set(ignored)
    kept_from_git = {
        line.strip("/")
        for line in (ROOT / ".gitignore").read_text().splitlines()
        if line and not line.startswith("!")
    }
    assert not kept_from_git - {line.removeprefix("**/") for line in ignored}


def test_the_image_takes_the_arguments_that_the_pages_name_and_files_that_exist() -> None:
    lines = (ROOT / "Dockerfile").read_text()
    arguments = set(re.findall(r"^ARG (\w+)", lines, flags=re.MULTILINE))
    page = (ROOT / "docs/install.md").read_text()
    assert set(re.findall(r"--build-arg (\w+)=", page)) == arguments == {"BASE", "TORCH_INDEX"}
    assert lines.index("ARG BASE=") < lines.index("FROM ${BASE}")
    for files in re.findall(r"^COPY (.+) \S+$", lines, flags=re.MULTILINE):
        assert all((ROOT / name).exists() for name in files.split())
