"""README and docs are correct: examples run as printed, every command exists named file exists."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
from typer import Context
from typer.main import get_command

from asrcore.cli._main import _hoisted, application
from tests.docs._markdown import PROJECT, blocks, pages

PAGES = {str(path.relative_to(PROJECT)): path.read_text(encoding="utf-8") for path in pages()}
ASR = get_command(application())
LIMIT = 120  # seconds for an example; they take a few


# -- Python ----------------------------------------------------------------------------------------------------------


def run(argv: list[str], folder: Path) -> str:
    """In a separate process, as a reader would."""
    done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_readmes_python_runs_in_an_empty_directory(tmp_path: Path) -> None:
    examples = [block.text for block in blocks(PAGES["README.md"]) if block.info.split()[:1] == ["python"]]
    assert examples
    for number, text in enumerate(examples):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "example.py").write_text(text, encoding="utf-8")
        printed = run([sys.executable, "-W", "error", "example.py"], folder)
        assert "REVERSE" in printed


def test_the_sample_driver_passes_the_kit(tmp_path: Path) -> None:
    files = {}
    for block in blocks(PAGES["docs/how-to/write-a-driver.md"]):
        named = re.match(r"# (\w+\.py)\n", block.text)
        if block.info == "python" and named:
            files[named[1]] = block.text
            (tmp_path / named[1]).write_text(block.text, encoding="utf-8")
    assert sorted(files) == ["folder_driver.py", "test_folder_driver.py"]
    kit = [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", "test_folder_driver.py"]
    passed = re.search(r"(\d+) passed", run(kit, tmp_path))
    assert passed is not None
    assert int(passed[1]) >= 20, "the rig skips nearly everything"


# -- commands --------------------------------------------------------------------------------------------------------


@attrs.frozen
class Line:
    """A command of a page; `words` without `asr`."""

    page: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}: asr {' '.join(self.words)}"


def _commands(text: str) -> Iterator[str]:
    """Shell lines in blocks that call `asr`, without prompt, comment and the part after a pipe."""
    for block in blocks(text):
        if block.info not in ("console", "sh", ""):
            continue
        for line in block.text.splitlines():
            command = re.sub(r"^\s*(?:\S*@\S*)?[$#] ", "", line)
            if re.match(r"asr ", command):
                yield re.split(r" [|&>]| #", command)[0]


def _lines() -> list[Line]:
    return [Line(name, tuple(shlex.split(command)[1:])) for name, text in PAGES.items() for command in _commands(text)]


def _spans() -> list[Line]:
    """`asr ...` in the text of a page: a verb, possibly with some of its options."""
    found = set()
    for name, text in PAGES.items():
        rest = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
        rest = re.sub(r"(?<!\n)\n *(?=[^\n|#-])", " ", rest)  # a span may be broken over two lines
        # A first word in capitals is a placeholder for several verbs (in the error catalogue).
        for span in re.findall(r"`asr (?![A-Z])([^`\n]+)`", rest):
            found.add(Line(name, tuple(shlex.split(span))))
    return sorted(found, key=str)


def _parse(words: tuple[str, ...]) -> None:
    """The same checks as in `asr` before it runs a verb."""
    command: Any = ASR
    vault, rest = _hoisted(list(words))
    context = command.make_context("asr", vault + rest)
    while hasattr(command, "commands"):
        rest = [*getattr(context, "_protected_args", []), *context.args]
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, list(rest), parent=context)


def _look_up(words: tuple[str, ...]) -> None:
    """The verb exists and has these options."""
    command: Any = ASR
    _, rest = _hoisted(list(words))
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        name = rest.pop(0)
        assert command.get_command(Context(command), name), f"there is no verb {name}"
        command = _resolved(command, name)
    known = {name for parameter in (*command.params, *ASR.params) for name in parameter.opts} | {"--help", "-h"}
    given = {word.partition("=")[0] for word in rest if word.startswith("-")}
    assert given <= known, f"there is no option {', '.join(sorted(given - known))}"


def test_pages_show_commands() -> None:
    shown = {line.page for line in _lines()}
    assert {"README.md", "docs/tutorial/two-hosts.md", "docs/how-to/when-things-go-wrong.md"} <= shown
    assert len(_lines()) > 50
    assert len(_spans()) > 50


@pytest.mark.parametrize("line", sorted(set(_lines()), key=str), ids=str)
def test_command_is_accepted(line: Line) -> None:
    _parse(line.words)


@pytest.mark.parametrize("line", _spans(), ids=str)
def test_verb_in_the_text_exists(line: Line) -> None:
    _look_up(line.words)


@pytest.mark.parametrize("words", ["polish web1", "failover test", "status --pretty", "protect web1 --from a"])
def test_a_wrong_command_is_seen(words: str) -> None:
    with pytest.raises(Exception, match=r"(?i)no such|missing|usage") as problem:
        _parse(tuple(words.split()))
    assert type(problem.value).__name__.endswith(("UsageError", "MissingParameter", "NoSuchOption", "NoSuchCommand"))


def _verbs(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if not hasattr(command, "commands"):
        yield path, command
        return
    for name in command.commands:
        yield from _verbs(_resolved(command, name), (*path, name))


def _resolved(command: Any, name: str) -> Any:
    """The command of that name: `asr` has only a line of help for each verb until one is called."""
    return command.resolve_command(Context(command), [name])[1]


@pytest.mark.parametrize(("path", "command"), list(_verbs(ASR)), ids=[" ".join(path) for path, _ in _verbs(ASR)])
def test_verb_is_in_the_reference_with_its_options(path: tuple[str, ...], command: Any) -> None:
    page = PAGES["docs/reference/cli.md"]
    example = f"| `{' '.join(path)}` | `asr {' '.join(path)}"
    rows = [line for line in page.splitlines() if line.startswith(example)]
    assert len(rows) == 1, "one row per verb, with an example"
    place = page if path in (("policy", "create"), ("policy", "set")) else rows[0]
    options = {name for item in command.params if item.param_type_name == "option" for name in item.opts}
    for name in sorted(options - {"--json", "--help", "-h"}):
        assert name in place, f"option {name} is missing"


PHYSICAL = _resolved(ASR, "physical")


@pytest.mark.parametrize("name", PHYSICAL.commands)
def test_command_of_the_physical_driver_is_on_its_page(name: str) -> None:
    assert re.search(rf"^\| `asr physical {name} ?\w*` \|", PAGES["drivers/physical/README.md"], re.MULTILINE)
