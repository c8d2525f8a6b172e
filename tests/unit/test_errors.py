"""The guarantees of the catalogue, for every class in it."""

from __future__ import annotations

import json
import pickle
import re

import pytest

from asrcore import errors
from asrcore.errors import AsrError, Category, catalogue

OURS = [kind for kind in catalogue().values() if kind.__module__ == errors.__name__]
every_error = pytest.mark.parametrize("kind", OURS, ids=lambda kind: kind.code)


def sample(kind: type[AsrError]) -> AsrError:
    """An instance with a recognisable value in each attribute; numbers where the template formats one."""
    texts = kind.happened + kind.cause + kind.action
    return kind(**{name: 7 if f"{{{name}:" in texts else f"<{name}>" for name in kind.fields()})


@every_error
def test_says_what_why_and_what_next(kind: type[AsrError]) -> None:
    error = sample(kind)
    assert str(error)
    assert not str(error).endswith("."), "it is inserted into other sentences"
    for text in (error.cause_text, error.action_text):
        assert text.strip()
        assert text[0].isupper() or text[0] in "`<"
        assert text.rstrip().endswith((".", ">")), text
    for name in kind.fields():
        shown = str(error) + error.cause_text + error.action_text
        assert f"<{name}>" in shown or "7" in shown


@every_error
def test_code_is_the_class_name_in_kebab_case(kind: type[AsrError]) -> None:
    words = re.findall(r"[A-Z][a-z]*", kind.__name__)
    assert kind.code == "-".join(words).lower()


@every_error
def test_survives_pickling(kind: type[AsrError]) -> None:
    error = sample(kind)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert again.as_dict() == error.as_dict()
    assert again.attributes == error.attributes


@every_error
def test_as_dict_is_json_with_everything(kind: type[AsrError]) -> None:
    error = sample(kind)
    reported = json.loads(json.dumps(error.as_dict()))
    assert reported == {
        "code": kind.code,
        "category": kind.category.name.lower(),
        "happened": str(error),
        "cause": error.cause_text,
        "action": error.action_text,
        "retry": kind.retry,
    }


@every_error
def test_missing_attribute_is_a_programming_error(kind: type[AsrError]) -> None:
    if kind.fields():
        with pytest.raises(TypeError, match=f"{kind.__name__} needs"):
            kind()


@every_error
def test_is_public(kind: type[AsrError]) -> None:
    assert not kind.__name__.startswith("_")
    assert getattr(errors, kind.__name__) is kind


def test_exit_codes_are_apart_from_each_other_and_from_the_shells() -> None:
    codes = [category.value for category in Category]
    assert len(set(codes)) == len(codes)
    # 0 is success, 1 a defect with its traceback, 126 and above belong to the shell.
    assert all(2 <= code < 126 for code in codes)


def test_every_category_is_used() -> None:
    assert {kind.category for kind in OURS} == set(Category)


def test_bad_credentials_and_invalid_state_are_not_retried() -> None:
    """Unrecoverable are authentication, authorisation, and a replica in an invalid state (W6 of
    docs/reference/site-recovery-map.md)."""
    never = {errors.AccessDenied, errors.TargetReadOnly, errors.WrongState, errors.StaleEpoch, errors.ReplicaDamaged}
    assert not any(kind.retry for kind in never)
    assert all(kind.retry for kind in (errors.SiteUnreachable, errors.TargetFull, errors.TimedOut))


def test_taken_code_is_refused() -> None:
    before = catalogue()
    with pytest.raises(TypeError, match="'invalid-value' is taken by InvalidValue"):

        class Again(AsrError):
            code = "invalid-value"

    assert catalogue() == before


def test_braces_in_values_are_no_templates() -> None:
    error = errors.InvalidValue(what="name", value="{what}", wanted="{nothing}")
    assert str(error) == "name: '{what}' is not accepted"
    assert error.cause_text == "name must be {nothing}."
