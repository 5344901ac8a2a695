"""The pages of the documentation, taken apart: fenced blocks, commands, files."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.paths import ROOT

RUNNABLE = "runnable"  # <!-- runnable --> above a block: the test executes it
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("**/*.md")),
    *sorted((ROOT / "experiments").glob("*/README.md")),
]
SHELL = ("bash", "console", "")  # the READMEs of the papers do not name a language
BLOCK = re.compile(
    r"(?:^<!-- (?P<note>[^\n]*) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    flags=re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block with the comment that stands directly above it."""

    page: Path
    language: str
    text: str
    note: str  # "runnable", "file: mine.jsonl" or empty

    @property
    def file(self) -> str | None:
        """The file that the block is: named above it, or in its first line (`# conf/...`)."""
        if self.note.startswith("file: "):
            return self.note.removeprefix("file: ")
        named = re.match(r"# (\S+\.(?:yaml|py))\n", self.text)
        return named[1] if named else None

    def commands(self) -> Iterator[str]:
        """The lines of a shell block, continuations joined, without comments."""
        for line in self.text.replace("\\\n", " ").splitlines():
            filled = re.sub(r"<[^>]+>", "placeholder", line.removeprefix("$ "))
            words = shlex.split(filled, comments=True)
            if words:
                yield shlex.join(words)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[Block]:
    return [
        Block(
            page=page,
            language=found["language"],
            text=found["text"],
            note=(found["note"] or "").strip(),
        )
        for found in BLOCK.finditer(page.read_text())
    ]


def commands() -> Iterator[tuple[Path, str]]:
    """Every command of every shell block, with its page."""
    for page in PAGES:
        for block in blocks(page):
            if block.language in SHELL:
                for command in block.commands():
                    if block.language or command.startswith("editkit "):
                        yield page, command


def inline_commands() -> Iterator[tuple[Path, str]]:
    """Commands in running text and in tables, without those that leave something to the reader."""
    for page in PAGES:
        text = BLOCK.sub("", page.read_text())
        for span in re.findall(r"`(editkit [^`\n]+)`", text):
            words = shlex.split(span)
            is_mention = len(words) == 2 and "=" not in words[1]  # `editkit show` as a word
            if not is_mention and not re.search(r"\.\.\.|<|\[--|[A-Z]{3,}", span):
                yield page, shlex.join(words)
