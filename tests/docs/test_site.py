"""The documentation as a site, and the changelog: both are built as for a release."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from tests.docs._markdown import PROJECT

DOCS = PROJECT / "docs"
# Attributes through which a browser loads something immediately; links that a reader may follow are not included.
LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}


def run(*words: str | Path) -> str:
    command = [sys.executable, "-m", *map(str, words)]
    done = subprocess.run(
        command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built with warnings as errors: the targets of links and anchors exist."""
    directory = tmp_path_factory.mktemp("site")
    run("mkdocs", "build", "--strict", "--site-dir", directory)
    return directory


class Page(HTMLParser):
    """What a page loads, the targets of its links, and the text of its paragraphs, lists and tables."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self._main = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag in LOADED and values.get("rel") != "canonical":
            self.loaded += filter(None, [values.get(LOADED[tag])])
        if tag == "a":
            self.links += filter(None, [values.get("href")])
        self._main = (self._main or values.get("role") == "main") and tag != "footer"
        if tag in {"p", "li", "td", "pre", "code"}:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self._open:
            self._open.remove(tag)

    def handle_data(self, data: str) -> None:
        if self._main and self._open and not {"pre", "code"} & set(self._open):
            self.text += data


def test_every_page_is_in_the_navigation(site: Path) -> None:
    home = Page(site / "index.html")
    expected = {path.relative_to(DOCS).with_suffix(".html").as_posix() for path in DOCS.glob("**/*.md")}
    assert expected <= {link.partition("#")[0] for link in home.links} | {"index.html"}


def test_every_page_is_on_the_first_page() -> None:
    """The list in docs/index.md and the navigation of the site are written by hand and must name the same pages."""
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"\]\(([^)#]+\.md)\)", index))
    config = (PROJECT / "mkdocs.yml").read_text(encoding="utf-8")
    navigation = set(re.findall(r"^ +- (?:.+: )?(\S+\.md)$", config, re.MULTILINE)) - {"index.md"}
    assert {place.replace("../", "repository/") for place in listed} == navigation


def test_nothing_is_loaded_from_other_hosts(site: Path) -> None:
    pages = sorted(site.glob("**/*.html"))
    assert len(pages) > 40
    loaded = {place for page in pages for place in Page(page).loaded}
    assert any(place.endswith(".css") for place in loaded)
    assert [place for place in loaded if re.match(r"(https?:)?//", place)] == []
    for style in site.glob("**/*.css"):
        assert not re.search(r"(url\(|@import\s+)[\"']?(https?:)?//", style.read_text(encoding="utf-8")), style.name


def test_all_markdown_became_html(site: Path) -> None:
    """Python-Markdown accepts less than other renderers: fences and lists that it does not accept stay in the text."""
    for path in site.glob("**/*.html"):
        page = Page(path)
        left = re.search(r"```|^\s*(- |\d+\. |\|)|\]\([\w./#-]+\)", page.text, re.MULTILINE)
        assert left is None, f"{path.relative_to(site)}: {page.text[left.start() :][:80]!r}"
        # An indented fence becomes code within a line, with the language as its first word.
        assert not re.search(r"<code>(console|ini|json|python|toml)\n", path.read_text(encoding="utf-8")), path


def test_what_pages_link_to_outside_docs_is_there(site: Path) -> None:
    for page in set(site.glob("**/*.html")) - {site / "404.html"}:  # its links start at the site's root
        for link in Page(page).links:
            if not re.match(r"[a-z]+:|#|//", link):
                assert (page.parent / unquote(link.partition("#")[0])).exists(), (
                    f"{page.relative_to(site)} links to {link}"
                )
    assert (site / "repository" / "deploy" / "systemd" / "asr-run.service").is_file()


def test_a_page_that_links_nowhere_fails_the_build(tmp_path: Path) -> None:
    """Checks that the strict build does find broken links."""
    for name in ("docs", "mkdocs.yml", "drivers", "deploy", "tests", *[path.name for path in PROJECT.glob("*.md")]):
        (tmp_path / name).symlink_to(PROJECT / name)
    (tmp_path / "docs").unlink()
    shutil.copytree(PROJECT / "docs", tmp_path / "docs")
    page = tmp_path / "docs" / "index.md"
    page.write_text(page.read_text(encoding="utf-8") + "\n[nowhere](nowhere.md)\n", encoding="utf-8")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0
    assert "nowhere.md" in done.stderr


def test_the_changelog_is_built_from_the_fragments() -> None:
    fragments = [path for path in (PROJECT / "changelog.d").iterdir() if path.name != "README.md"]
    text = run("towncrier", "build", "--draft", "--version", "9.9.9")
    assert "## 9.9.9" in text
    for fragment in fragments:
        first = fragment.read_text(encoding="utf-8").split("\n")[0]
        assert first in text, f"{fragment.name} is not in the changelog: is its type one of pyproject.toml?"
