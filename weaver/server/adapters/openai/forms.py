"""The form that a text is to have: `response_format`, vLLM's names for such, calls that must be.

Read by `bodies`; what comes of it is a JSON schema or a grammar of `SamplingParams`.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ConfigDict, Field

from weaver import errors
from weaver.server.http.body import Body
from weaver.types import JsonDict

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Form = dict[str, Any]
"""Of `SamplingParams`: `{"json_schema": ...}`, `{"grammar": ...}` or neither."""
ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
MOST_CHOICES = 1024


class Schema(Body):
    content: JsonDict = Field(alias="schema")


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None

    @property
    def form(self) -> Form:
        """Raises InvalidRequestError."""
        if self.type == "text":
            return {}
        if self.type == "json_object":
            return {"json_schema": ANY_OBJECT}
        if self.json_schema is None:
            raise errors.InvalidRequestError(
                "is missing.",
                field="response_format.json_schema",
                hint='Give {"name": ..., "schema": {...}}.',
            )
        return {"json_schema": self.json_schema.content}


class Structure(Body):
    """`structured_outputs` of vLLM, and its older names, which begin with `guided_`."""

    model_config = ConfigDict(extra="forbid")

    schema_: JsonDict | str | None = Field(None, alias="json")
    regex: Annotated[str, Field(min_length=1)] | None = None
    choice: Annotated[tuple[str, ...], Field(min_length=1, max_length=MOST_CHOICES)] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    @property
    def forms(self) -> list[Form]:
        """One for each that is given."""
        found: list[Form] = []
        if self.schema_ is not None:
            found.append({"json_schema": self.schema_})
        if self.json_object:
            found.append({"json_schema": ANY_OBJECT})
        if self.regex is not None:
            found.append({"grammar": f"start: /{_escaped(self.regex)}/"})
        if self.choice is not None:
            either = " | ".join(map(json.dumps, self.choice))
            found.append({"grammar": f"start: CHOICE\nCHOICE: {either}"})
        if self.grammar is not None:
            found.append({"grammar": self.grammar})
        return found


def one_of(forms: Sequence[Form]) -> Form:
    """The only one. Raises InvalidRequestError."""
    given = [form for form in forms if form]
    if len(given) > 1:
        raise errors.InvalidRequestError(
            "is asked for in more than one way.",
            field="response_format",
            hint="Give one of response_format, structured_outputs, guided_... and a tool_choice "
            "that asks for a call.",
        )
    return given[0] if given else {}


def _escaped(regex: str) -> str:
    """As it stands between slashes."""
    found = re.sub(r"\\.|/", lambda m: r"\/" if m[0] == "/" else m[0], regex, flags=re.DOTALL)
    return found.replace("\n", r"\n")
