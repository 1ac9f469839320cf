"""`Value`: what all values that users build and receive are, and how a bad field of one is told.

`weaver.types` and `weaver.protocol` are made of them.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError

from weaver import fields
from weaver.errors import InvalidParamsError, InvalidRequestError, nearest

LONGEST_CELL = 2000


class Value(BaseModel, Mapping[str, Any]):
    """A frozen value with attribute and mapping access."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        arbitrary_types_allowed=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )
    _error: ClassVar[type[InvalidRequestError]] = InvalidParamsError
    _also: ClassVar[tuple[str, ...]] = ()
    """Attributes that read as keys, beside the fields."""

    def __init__(self, **data: Any) -> None:
        if len(data) > fields.MAX_NAMES:  # pydantic would describe each that it does not know
            data = dict(list(data.items())[: fields.MAX_NAMES])
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise _named(error, type(self)) from None

    def _repr_html_(self) -> str:
        """In notebooks: a line for each field that is set, as text, whatever is in it."""
        return table_html(self)

    def __getitem__(self, key: str) -> Any:
        if key in type(self).model_fields or key in self._also:
            return getattr(self, key)
        raise KeyError(key)

    def __iter__(self) -> Iterator[str]:  # type: ignore[override]
        return iter(type(self).model_fields)

    def __len__(self) -> int:
        return len(type(self).model_fields)


def table_html(fields: Mapping[str, object]) -> str:
    """A line for each field that is set, as text, whatever is in it."""
    rows = [
        f"<tr><td>{escape(name)}</td><td>{_html(value)}</td></tr>"
        for name, value in fields.items()
        if value not in (None, (), {})
    ]
    return f"<table>{''.join(rows)}</table>"


def _html(value: object) -> str:
    if isinstance(value, tuple) and all(isinstance(each, Value) for each in value):
        return "".join(each._repr_html_() for each in value)
    return f"<pre>{escape(str(value)[:LONGEST_CELL])}</pre>"


def _named(error: ValidationError, cls: type[Value]) -> InvalidRequestError:
    """A problem that pydantic found, as our error: an unknown field, which may be why another is
    missing, or the first; with the field, the value, the bound."""
    problems = error.errors(include_url=False)
    problem = next((one for one in problems if one["type"] == "extra_forbidden"), problems[0])
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, InvalidRequestError):
        return cause
    field = ".".join(str(part)[:80] for part in problem["loc"]) or cls.__name__
    if problem["type"] == "extra_forbidden":
        return cls._error(
            f"{cls.__name__} has no such field.", field=field, hint=nearest(field, cls.model_fields)
        )
    if problem["type"] == "missing":
        return cls._error(f"{cls.__name__} needs it.", field=field, hint="Pass a value.")
    given = reprlib.repr(problem["input"])
    given = given if len(given) <= 60 else f"{given[:57]}..."
    return cls._error(f"is {given}.", field=field, hint=f"{problem['msg']}.")
