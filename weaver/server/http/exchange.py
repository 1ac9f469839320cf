"""The two routes that every operation takes: submissions go in, outcomes come out.

They read their requests themselves: what the framework does for the other routes costs as much as
all that the server does for an operation beside it. Their OpenAPI parameters are written here.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import Field, TypeAdapter
from starlette.exceptions import HTTPException
from starlette.routing import request_response

from weaver import wire
from weaver.errors import TooLargeError
from weaver.protocol import Outcome, Submission
from weaver.server.http.front import LONGEST_POLL_S, MEDIA_TYPE
from weaver.types import Value

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fastapi import APIRouter

SUBMISSIONS = TypeAdapter(Annotated[tuple[Submission, ...], Field(fail_fast=True)])
BINARY: dict[str, Any] = {
    "content": {MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}}
}


class Accepted(Value):
    accepted: int


class Poll(Value):
    after: int = Field(0, ge=0, le=2**63)
    timeout: float = Field(0.0, ge=0, le=LONGEST_POLL_S)


async def submit(request: Request) -> Response:
    front, service = request.state.front, request.state.service
    if request.headers.get("Content-Type") != MEDIA_TYPE:
        raise HTTPException(415, f"Submissions are sent as {MEDIA_TYPE}")
    data = await request.body()
    read = partial(wire.decode, data, SUBMISSIONS, limits=front.message_limits)
    announced = wire.announced_bytes(data)
    async with front.reading.of(announced):
        submissions = await wire.beside(announced, read, limiter=front.readers)
        count, limit = len(submissions), front.service.limits.submissions
        if count > limit:
            raise TooLargeError(f"{count} submissions in a request, the limit is {limit}.")
        request.state.logged = {"operation_ids": [submission.id for submission in submissions]}
        await service.submit(request.path_params["session_id"], submissions)
    front.metrics.submitted(submissions)
    return JSONResponse(Accepted(accepted=len(submissions)).model_dump(), status_code=202)


async def collect(request: Request) -> Response:
    front, service = request.state.front, request.state.service
    poll = Poll(**request.query_params)
    outcomes: Sequence[Outcome] = ()
    with front.until_it_stops():
        outcomes = await service.collect(
            request.path_params["session_id"], after=poll.after, timeout_s=poll.timeout
        )
    outcomes = next(wire.portions(outcomes), [])  # the cursor of the next poll asks for the rest
    front.metrics.collected(outcomes)
    data = await wire.beside(wire.about_bytes(outcomes), partial(wire.encode, outcomes))
    return Response(data, media_type=MEDIA_TYPE)


class _DirectRoute(APIRoute):
    """Its endpoint takes the request and answers the response, with nothing between."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.app = request_response(self.endpoint)


IN_PATH: dict[str, Any] = {
    "name": "session_id",
    "in": "path",
    "required": True,
    "schema": {"type": "string"},
}
IN_QUERY: list[dict[str, Any]] = [
    {"name": name, "in": "query", "schema": schema}
    for name, schema in Poll.model_json_schema()["properties"].items()
]


def add_exchange(router: APIRouter) -> None:
    body = {"parameters": [IN_PATH], "requestBody": {**BINARY, "required": True}}
    add = partial(router.add_api_route, route_class_override=_DirectRoute)
    add(
        "/sessions/{session_id}/submissions",
        submit,
        methods=["POST"],
        response_model=Accepted,
        status_code=202,
        openapi_extra=body,
    )
    add(
        "/sessions/{session_id}/outcomes",
        collect,
        methods=["GET"],
        response_class=Response,
        responses={200: BINARY},
        openapi_extra={"parameters": [IN_PATH, *IN_QUERY]},
    )
