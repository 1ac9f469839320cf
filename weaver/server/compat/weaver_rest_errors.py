"""Refusals in the envelope of the Weaver REST interface; used by the server's error handlers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from weaver.errors import WeaverError
    from weaver.types import JsonDict

PREFIX = "/api/v1"
LATER = (429, 503, 504)
"""Statuses after which the same request may succeed."""


def error_envelope(error: WeaverError, request_id: str, *, status: int) -> JsonDict:
    """The body of an answer that is not a success."""
    return {
        "error": error.code,
        "message": str(error),
        "retryable": status in LATER,
        "request_id": request_id,
        "details": {"field": error.field, "hint": error.hint},
    }
