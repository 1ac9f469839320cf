"""The console's routes: its pages, which say nothing of anybody's work, and read-only JSON.

`create_app` mounts both. The pages need no build: `static/` is served as it lies there.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from anyio import to_thread
from fastapi import APIRouter, Query, Request
from starlette.staticfiles import StaticFiles

from weaver.errors import PermissionDeniedError
from weaver.server.activity import OperationInfo
from weaver.server.console.curves import Curve, curves_of
from weaver.server.console.load import ServerLoad, load_of
from weaver.server.http.adapter import Adapter
from weaver.server.http.errors import REFUSALS, native_envelope
from weaver.server.http.front import BODY_LIMITS, Fronted, Scoped
from weaver.types import Value

if TYPE_CHECKING:
    from starlette.responses import Response
    from starlette.types import Scope

POINTS = 400
"""Of a curve: more than a chart has pixels to tell apart."""
PENDING = 100
"""Operations that a page lists."""
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
router = APIRouter(prefix="/v1", responses=REFUSALS)


class CallerInfo(Value):
    project: str
    admin: bool


class RunOperations(Value):
    pending: tuple[OperationInfo, ...]
    """At most 100, what runs first."""
    num_pending: int
    ended: tuple[OperationInfo, ...]
    """The last 30 since the server started, the newest first."""


class Pages(StaticFiles):
    """Files with the headers that let a page run nothing but its own scripts."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(HEADERS)
        return response


PAGES = Pages(directory=Path(__file__).parent / "static")
PAGE_FILES = {"/": "index.html", "/docs": "docs.html"}
"""By the path at which they are."""
pages = APIRouter(include_in_schema=False)
pages.mount("/console", PAGES)


async def get_page(request: Request) -> Response:
    return await PAGES.get_response(PAGE_FILES[request.scope["route"].path], request.scope)


for _path in PAGE_FILES:
    pages.add_api_route(_path, get_page, methods=["GET", "HEAD"])


@router.get("/caller", response_model=CallerInfo)
async def get_caller(request: Request) -> CallerInfo:
    caller = request.state.caller
    return CallerInfo(project=caller.project, admin=caller.admin)


@router.get("/runs/{run_id}/operations", response_model=RunOperations)
async def list_operations(run_id: str, front: Fronted, service: Scoped) -> RunOperations:
    await service.get_run(run_id)  # also refuses another project's
    pending = front.service.activity.pending_of(run_id)
    return RunOperations(
        pending=tuple(pending[:PENDING]),
        num_pending=len(pending),
        ended=tuple(reversed(front.service.activity.ended_of(run_id))),
    )


@router.get("/runs/{run_id}/curves", response_model=list[Curve])
async def read_curves(
    run_id: str,
    front: Fronted,
    service: Scoped,
    points: Annotated[int, Query(ge=2, le=10_000)] = POINTS,
) -> list[Curve]:
    """What the client logged, and what the run's operations answered."""
    logged = await service.read_metrics(run_id)
    answers = await front.service.activity.answers_of(run_id)
    return await to_thread.run_sync(lambda: curves_of(logged, answers, most=points))


@router.get("/load", response_model=ServerLoad)
async def get_load(request: Request, front: Fronted) -> ServerLoad:
    """Of the whole server, by project: for administrators."""
    if not request.state.caller.admin:
        raise PermissionDeniedError("the load of the server needs an administrator's key.")
    return await load_of(front, request.state.caller)


CONSOLE = Adapter(
    routes=[*pages.routes, *router.routes],
    prefix="",
    envelope=native_envelope,
    body_limits=BODY_LIMITS,
    open_paths=(*PAGE_FILES, "/console/*"),
)
