"""What is in the pages: blocks of code, command lines, links. The tests of the documentation read it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_BLOCK = re.compile(r"^```(\w*)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^()\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the file that it is to be saved as (or an empty string), its text, its line."""

    language: str
    title: str
    text: str
    line: int


def documents() -> list[Path]:
    """The pages that people read, notes excepted: those are frozen."""
    return [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "DESIGN.md")),
        *sorted((ROOT / "docs").glob("*.md")),
        *sorted((ROOT / "docs/api").glob("*.md")),
    ]


def blocks(page: Path, language: str | None = None) -> list[Block]:
    """The fenced blocks of a page, or those of one language."""
    text = page.read_text()
    fences = [
        Block(match[1], match[2] or "", match[3], text.count("\n", 0, match.start()) + 2)
        for match in _BLOCK.finditer(text)
    ]
    return [block for block in fences if language in (None, block.language)]


def command_lines(page: Path, program: str) -> Iterator[list[str]]:
    """The arguments of every line in a block that begins with ``program``, such as "apv-fast" or "python -m"."""
    for block in blocks(page):
        if block.language in ("", "sh", "console"):
            for line in block.text.splitlines():
                if line.startswith(program + " "):
                    yield shlex.split(line.removeprefix(program), comments=True)


def links(page: Path) -> Iterator[str]:
    """Where a page links to inside the repository, anchors left out."""
    for target in _LINK.findall(page.read_text()):
        path = target.partition("#")[0]
        if path and ":" not in path:
            yield path
