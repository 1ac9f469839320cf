"""`create_app`: the ASGI application over a service; run by `weaver serve` and by tests."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response

from weaver.errors import PermissionDeniedError
from weaver.server.compat import weaver_rest
from weaver.server.console import routes as console
from weaver.server.http.edge import Edge
from weaver.server.http.errors import ErrorAnswer, add_error_handlers
from weaver.server.http.exchange import add_exchange
from weaver.server.http.routes import Fronted, router

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from weaver.server.http.front import Front

SECURITY = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "key": {"type": "apiKey", "in": "header", "name": "X-WEAVER-API-KEY"},
}
"""For the OpenAPI page only: `Edge` has checked the key before a route is reached."""


def create_app(front: Front) -> ASGIApp:
    """The application; whoever calls it opens and closes the service and the database."""
    return Edge(_routes(), front)


@cache
def _routes() -> FastAPI:
    """Built once for all fronts: each request brings its own."""
    app = FastAPI(
        title="Weaver",
        description="Ordered operations on language models in training. See docs/wire.md.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    add_error_handlers(app)
    refusal = {"model": ErrorAnswer, "description": "Refused; `error.code` says why."}
    refusals: dict[int | str, dict[str, Any]] = {"4XX": refusal, "5XX": refusal}
    add_exchange(app, responses=refusals)
    for native in (router, console.router):
        app.include_router(native, responses=refusals)
    app.include_router(weaver_rest.router)
    for path in console.PAGE_FILES:
        app.add_api_route(path, console.get_page, methods=["GET", "HEAD"], include_in_schema=False)
    app.mount("/console", console.PAGES)
    app.add_api_route("/healthz", healthz, include_in_schema=False)
    app.add_api_route("/readyz", readyz, include_in_schema=False)
    app.add_api_route("/metrics", metrics, include_in_schema=False)
    document = app.openapi()
    document["components"]["securitySchemes"] = SECURITY
    document["security"] = [{name: []} for name in SECURITY]
    return app


async def healthz() -> dict[str, str]:
    return {"status": "alive"}


async def readyz(front: Fronted, response: Response) -> dict[str, str]:
    if front.stopping.is_set():
        response.status_code = 503
    return {"status": "stopping" if front.stopping.is_set() else "ready"}


async def metrics(front: Fronted, request: Request) -> Response:
    if not request.state.caller.admin:
        raise PermissionDeniedError("metrics of the server need an administrator's key.")
    return Response(front.metrics.render(), media_type="text/plain; version=0.0.4")
