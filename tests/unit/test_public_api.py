"""The public names are those of `public_api.txt`: a change of one shows in the review, and belongs in the changelog.

`python -m tests.unit.test_public_api` writes the list. It has the parameters of each function and constructor, the
members of each class, the values of each enumeration, and code, category and retry of each error. Types are not in it:
`tests/typing` has them.
"""

from __future__ import annotations

import enum
import inspect
import pkgutil
import re
from collections.abc import Iterator
from functools import cached_property
from importlib import import_module
from pathlib import Path
from types import ModuleType

from asrcore.errors import AsrError

FILE = Path(__file__).with_name("public_api.txt")
PAGE = Path(__file__).parents[2] / "docs" / "reference" / "api-stability.md"


def modules() -> list[ModuleType]:
    """Those of the page, and the public ones below a package that it names in whole."""
    section = PAGE.read_text(encoding="utf-8").partition("## Public Python modules")[2].partition("\n## ")[0]
    found = {}
    for name, below in re.findall(r"^\| `(asrcore[\w.]*?)(\.\*)?` \|", section, re.MULTILINE):
        module = import_module(name)
        if not below:
            found[name] = module
        if below or name == "asrcore.testing":
            for item in pkgutil.walk_packages(module.__path__, f"{name}."):
                if not any(part.startswith("_") for part in item.name.split(".")):
                    found[item.name] = import_module(item.name)
    return [found[name] for name in sorted(found)]


def parameters(function: object) -> str:
    """As they are called: names, which are optional, which by name only."""
    words, by_name = [], False
    for item in inspect.signature(function).parameters.values():  # type: ignore[arg-type]
        if item.kind is item.KEYWORD_ONLY and not by_name:
            words.append("*")
        by_name = by_name or item.kind in (item.KEYWORD_ONLY, item.VAR_POSITIONAL)
        star = "*" if item.kind is item.VAR_POSITIONAL else "**" if item.kind is item.VAR_KEYWORD else ""
        words.append(star + item.name + ("" if item.default is item.empty else "="))
    return f"({', '.join(words)})"


def members(name: str, kind: type) -> Iterator[str]:
    """Of a class, without those that it inherits."""
    if issubclass(kind, enum.Enum):
        yield name
        yield from (f"{name}.{item.name} = {item.value!r}" for item in kind)
        return
    if issubclass(kind, AsrError) and kind is not AsrError:
        yield f"{name}: {kind.code}, {kind.category.name}{', retried' if kind.retry else ''}"
        return
    plain = kind.__init__ in (object.__init__, BaseException.__init__)  # of the latter Python knows no signature
    yield name + (" (abstract)" if inspect.isabstract(kind) else "" if plain else parameters(kind))
    for key in sorted(vars(kind)):
        value = vars(kind)[key]
        if key.startswith("_"):
            continue
        if isinstance(value, (classmethod, staticmethod)):
            value = getattr(kind, key)
        if isinstance(value, cached_property) or not inspect.isroutine(value):  # Python takes the first for a routine
            yield f"{name}.{key}"
        else:
            yield f"{name}.{key}{parameters(value)}"


def own(module: ModuleType) -> list[str]:
    """The names of a module without a list: what it defines itself, without a leading underscore (the errors)."""
    return [
        key
        for key, value in vars(module).items()
        if not key.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]


def render() -> str:
    """One line for each name."""
    lines: list[str] = []
    for module in modules():
        for key in sorted(getattr(module, "__all__", ()) or own(module)):
            name, value = f"{module.__name__}.{key}", getattr(module, key)
            if inspect.isclass(value):
                lines += members(name, value)
            else:
                lines.append(name + (parameters(value) if inspect.isroutine(value) else ""))
    return "\n".join(lines) + "\n"


def test_public_names_are_as_they_were() -> None:
    assert render() == FILE.read_text(encoding="utf-8"), (
        "changed: `python -m tests.unit.test_public_api` writes the list; put it into the changelog"
    )


if __name__ == "__main__":
    FILE.write_text(render(), encoding="utf-8")
