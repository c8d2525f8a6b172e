"""Reads the project's Markdown: blocks of code, links, headings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import attrs

PROJECT = Path(__file__).resolve().parents[2]


@attrs.frozen
class Block:
    """A fenced block: the words after the fence, the text, and the line of the file that the text starts at."""

    info: str
    text: str
    line: int


def pages() -> list[Path]:
    """Every page that describes the present state: not the changelog, which names former states."""
    found = [
        *(path for path in PROJECT.glob("*.md") if path.name != "CHANGELOG.md"),
        *PROJECT.glob("docs/**/*.md"),
        *PROJECT.glob("drivers/**/README.md"),
        *PROJECT.glob("examples/*/README.md"),
        *PROJECT.glob("tests/**/README.md"),
    ]
    found += PROJECT.glob("examples/*/README.md")
    return sorted(path for path in found if path.is_file())


def blocks(text: str) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    for match in re.finditer(r"^```([^\n`]*)\n(.*?)^```[ \t]*$", text, re.MULTILINE | re.DOTALL):
        yield Block(match[1].strip(), match[2], text.count("\n", 0, match.start(2)) + 1)


def prose(text: str) -> str:
    """The page without its fenced blocks and code spans."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```[ \t]*$", "", text, flags=re.MULTILINE | re.DOTALL))


def anchors(text: str) -> set[str]:
    """The anchors that `#...` in a link may name: headings, spelled as common renderers do."""
    headings = re.findall(r"^#+\s+(.+?)\s*$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(text: str) -> list[str]:
    """Targets of the links within the project."""
    found = re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", prose(text))
    return [link for link in found if not re.match(r"[a-z]+:", link)]
