"""Errors as HTTP answers: one status per code, in the envelope of the adapter that was asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from weaver import errors, fields, protocol, types
from weaver.errors import WeaverError

if TYPE_CHECKING:
    from fastapi import Request
    from starlette.types import Scope

STATUS = {
    "invalid_request": 400,
    "unauthenticated": 401,
    "permission_denied": 403,
    "not_found": 404,
    "run_not_found": 404,
    "checkpoint_not_found": 404,
    "unknown_model": 404,
    "conflict": 409,
    "name_taken": 409,
    "checkpoint_error": 409,
    "checkpoint_mismatch": 409,
    "closed": 410,
    "too_large": 413,
    "quota_exceeded": 429,
    "connection_failed": 503,
    "timeout": 504,
    "storage_error": 507,
}
"""By code; any other invalid request is 422, anything else 500."""
RETRY_AFTER_S = {429: 1, 503: 1, 504: 1}
"""Sent where trying again can help."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request gets no other answer."""

    error: WeaverError
    status: int
    request_id: str

    @property
    def retryable(self) -> bool:
        return self.status in RETRY_AFTER_S

    def answer(self, content: types.JsonDict) -> JSONResponse:
        """With the headers that go with the status."""
        headers = {"Retry-After": str(RETRY_AFTER_S[self.status])} if self.retryable else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(content, status_code=self.status, headers=headers)


Envelope = Callable[[Refusal], JSONResponse]


class ErrorDetail(protocol.ErrorInfo):
    request_id: str


class ErrorAnswer(types.Value):
    """The body of every answer that is not a success."""

    error: ErrorDetail


_REFUSED = {"model": ErrorAnswer, "description": "Refused; `error.code` says why."}
REFUSALS: dict[int | str, dict[str, Any]] = {"4XX": _REFUSED, "5XX": _REFUSED}
"""As OpenAPI describes them."""


def native_envelope(refusal: Refusal) -> JSONResponse:
    info = protocol.ErrorInfo.of(refusal.error).model_dump()
    answer = ErrorAnswer(error=ErrorDetail(**info, request_id=refusal.request_id))
    return refusal.answer(answer.model_dump())


def error_response(error: WeaverError, scope: Scope, *, status: int | None = None) -> JSONResponse:
    """In the envelope of the adapter that has the request."""
    status = status or STATUS.get(error.code)
    if status is None:
        status = 422 if isinstance(error, errors.InvalidRequestError) else 500
    state = scope["state"]
    envelope: Envelope = state.get("envelope", native_envelope)
    return envelope(Refusal(error, status, state["request_id"]))


async def answer(request: Request, error: Exception) -> JSONResponse:
    """What the server says of an error of a route, or of the framework around it."""
    scope = request.scope
    match error:
        case WeaverError():
            return error_response(error, scope)
        case RequestValidationError():
            return _unread(request, error)
        case HTTPException(status_code=status):  # no such route or method, too long a body
            kind = {404: errors.NotFoundError, 413: errors.TooLargeError}.get(
                status, errors.InvalidRequestError
            )
            hint = "GET /openapi.json lists what there is." if status in (404, 405) else None
            response = error_response(kind(f"{error.detail}.", hint=hint), scope, status=status)
            response.headers.update(error.headers or {})
            return response
    # Nothing of the cause: the log has it, under the same request id.
    hint = f"Report it with the log of request {request.state.request_id}."
    return error_response(errors.EngineError("the server has a defect.", hint=hint), scope)


def _unread(request: Request, error: RequestValidationError) -> JSONResponse:
    problem = error.errors()[0]
    kind = request.headers.get("Content-Type", "")
    if isinstance(error.body, bytes) and error.body and "json" not in kind:  # it was not read
        wrong = errors.InvalidRequestError(
            f"a body of the type {kind!r} is not read here.",
            field="Content-Type",
            hint="Send JSON, as application/json.",
        )
        return error_response(wrong, request.scope, status=415)
    status = 400 if problem["type"] == "json_invalid" else 422
    return error_response(fields.refusal(problem), request.scope, status=status)
