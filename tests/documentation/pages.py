"""What the documentation tells people to type: fenced blocks of README.md, CONTRIBUTING.md and docs/."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"`([\w./-]+\.\w+)`[^`\n]*:$")


@dataclass(frozen=True)
class Block:
    """A fenced block, and the name of the file that it is, where the line above says so."""

    page: Path
    line: int
    language: str
    text: str
    file: str | None

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def commands(self) -> Iterator[list[str]]:
        """The words of each command of a shell's block; of a console's block those behind `$`."""
        if self.text.startswith("#!"):
            return  # a whole script
        for line in re.sub(r"\\\n\s*", "", self.text).splitlines():
            if self.language == "console":
                if not line.startswith("$ "):
                    continue
                line = line[2:]
            if words := shlex.split(line, comments=True):
                yield words


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text()
    for found in _FENCE.finditer(text):
        above = text[: found.start()].rstrip("\n").rpartition("\n")[2]
        name = _FILE.search(above)
        line = text.count("\n", 0, found.start()) + 1
        yield Block(page, line, found[1], found[2], name[1] if name else None)


def commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Every command of a page, and where it stands."""
    for block in blocks(page):
        if block.language in ("bash", "console"):
            for words in block.commands:
                yield block.name, words
