"""mkdocs hooks: the site holds what its pages link to outside docs/, and its anchors are spelt as on GitHub.

Pages link to files by their paths in the repository, so that the links work where the files are read. In the site such
a file is at `repository/PATH`: Markdown as a page, anything else as it is. A link to a directory becomes plain text.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

PROJECT = Path(__file__).resolve().parents[1]
DOCS = PROJECT / "docs"
OUTSIDE = "repository"

# A fenced block or a code span is left alone; a link is `[text](target)` without a scheme.
_LINK = re.compile(
    r"^```.*?^```[ \t]*$"
    r"|`[^`\n]*`"
    r"|\[(?P<text>(?:[^\[\]`]|`[^`]*`)*)\]\((?![a-z]+:)(?P<place>[^)#\s]*)(?P<anchor>#[^)\s]*)?\)",
    re.MULTILINE | re.DOTALL,
)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Make anchors of headings as common renderers do; the default of Python-Markdown differs for `A & b`."""
    config.mdx_configs["toc"] = {**config.mdx_configs.get("toc", {}), "slugify": _anchor}
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files outside docs/ that pages link to, and those that these pages link to."""
    todo = sorted(DOCS.glob("**/*.md"))
    seen = set(todo)
    while todo:
        page = todo.pop()
        for target in _linked(page):
            if target in seen or target.is_relative_to(DOCS) or not target.is_file():
                continue
            seen.add(target)
            files.append(File.generated(config, _place(target), abs_src_path=str(target)))
            if target.suffix == ".md":
                todo.append(target)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links between docs/ and the rest of the repository to where their targets are in the site."""
    source = _source(page.file.src_uri)

    def rewritten(match: re.Match[str]) -> str:
        if not match["place"]:  # code, or an anchor of this page
            return match[0]
        target = _target(source, match["place"])
        if not target.is_relative_to(DOCS) and target.is_dir():
            return match["text"]
        place = os.path.relpath(_place(target), Path(page.file.src_uri).parent)
        return f"[{match['text']}]({place}{match['anchor'] or ''})"

    # Python-Markdown knows one word behind a fence; `test` is for this project's tests.
    return re.sub(r"^```python test$", "```python", _LINK.sub(rewritten, markdown), flags=re.MULTILINE)


def _linked(page: Path) -> list[Path]:
    matches = _LINK.finditer(page.read_text(encoding="utf-8"))
    return [_target(page, match["place"]) for match in matches if match["place"]]


def _target(page: Path, place: str) -> Path:
    return Path(os.path.normpath(page.parent / place))


def _place(path: Path) -> str:
    """Where a file of the repository is in the site's sources."""
    return (path.relative_to(DOCS) if path.is_relative_to(DOCS) else OUTSIDE / path.relative_to(PROJECT)).as_posix()


def _source(place: str) -> Path:
    path = Path(place)
    return PROJECT / path.relative_to(OUTSIDE) if path.parts[0] == OUTSIDE else DOCS / path


def _anchor(heading: str, separator: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", separator)
