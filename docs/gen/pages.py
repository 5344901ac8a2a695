"""Run by mkdocs-gen-files: writes the generated reference pages into the site."""

from __future__ import annotations

import sys
from pathlib import Path

import mkdocs_gen_files

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from docs.gen.reference import pages

for path, text in pages().items():
    with mkdocs_gen_files.open(path, "w") as file:
        file.write(text)
