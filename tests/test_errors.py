"""The error tree: codes are unique, stable and find their way back."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import pytest

from weaver import errors
from weaver.errors import CODES, InvalidDatumError, WeaverError, from_code, nearest
from weaver.protocol import ErrorInfo
from weaver.server.http.errors import error_response


def _all_classes() -> list[type[WeaverError]]:
    found = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, WeaverError)]
    return sorted(found, key=lambda cls: cls.__name__)


@pytest.mark.parametrize("cls", _all_classes(), ids=lambda cls: cls.__name__)
def test_every_error_survives_the_wire_and_a_pickle(cls: type[WeaverError]) -> None:
    error = cls("went wrong.", field="rank", hint="Use 8.")
    assert CODES[cls.code] is cls
    for copy in (ErrorInfo.of(error).to_error(), pickle.loads(pickle.dumps(error))):
        assert type(copy) is cls
        assert str(copy) == "rank: went wrong. Use 8."


def test_codes_are_unique_and_drawn_in_the_docstring() -> None:
    assert len(CODES) == len(_all_classes())
    drawing = errors.__doc__ or ""
    for cls in _all_classes():
        assert re.search(rf"\b{cls.__name__}\b.*\b{cls.code}\b", drawing), cls


def test_a_code_of_a_newer_peer_is_a_weaver_error() -> None:
    assert type(from_code("from_the_future", "hm")) is WeaverError


def test_nearest_names_one_or_all() -> None:
    assert nearest("cross_entropi", ["cross_entropy", "ppo"]) == "Did you mean 'cross_entropy'?"
    assert nearest("zzz", ["b", "a"]) == "Known: a, b."
    assert nearest("zzz", []) == "Known: none."


def test_standard_classes_catch_ours() -> None:
    with pytest.raises(ValueError, match="bad"):
        raise InvalidDatumError("bad")
    assert issubclass(errors.WaitTimeoutError, TimeoutError)
    assert issubclass(errors.RunNotFoundError, LookupError)


def test_the_page_has_every_code_with_its_class_and_status() -> None:
    page = (Path(__file__).parents[1] / "docs/errors.md").read_text()
    row = re.compile(r"^\| `(\w+)` \| `(\w+)` \| (\d+) \| ([^|]+) \| ([^|]+) \|$", re.MULTILINE)
    rows = row.findall(page)
    assert [(code, name) for code, name, *_ in rows] == [
        (code, cls.__name__) for code, cls in CODES.items()
    ]
    for code, _, status, when, what_to_do in rows:
        answer = error_response(CODES[code](""), {"state": {"request_id": "1"}})
        assert (answer.status_code, code) == (int(status), code)
        assert when.strip() and what_to_do.strip()
