"""`Body`: what a request brings as JSON, for wire formats whose clients may be newer than a server.

JSON is counted before it is read, beside the event loop where it is large.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Self

from pydantic import BaseModel, ConfigDict
from pydantic_core import from_json

from weaver import errors, wire
from weaver.fields import validate

if TYPE_CHECKING:
    from fastapi import Request

    from weaver.server.http.gateway import Gateway


class Body(BaseModel):
    """A request, or a part of one; fields that it does not name are ignored."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False, protected_namespaces=())

    @classmethod
    def of(cls, content: Any) -> Self:
        """From what JSON says. Raises InvalidRequestError, with the field at fault."""
        return validate(content, cls.model_validate, name="body")

    @classmethod
    async def read(cls, request: Request) -> Self:
        """Raises InvalidRequestError, TooLargeError: with the field at fault."""
        gateway: Gateway = request.state.gateway
        data = await request.body()
        async with gateway.read(len(data), partial(cls._read, data)) as body:
            return body

    @classmethod
    def _read(cls, data: bytes) -> Self:
        return cls.of(json_of(data or b"{}"))


def json_of(data: bytes) -> Any:
    """Raises InvalidRequestError, TooLargeError."""
    wire.check_json(data)
    try:
        return from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise errors.InvalidRequestError(f"is not JSON: {error}.", field="body") from None
