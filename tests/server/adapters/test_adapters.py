"""A wire format beside Weaver REST, below one prefix: each keeps its envelope and its limits."""

from __future__ import annotations

import re
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any
from uuid import UUID

import pytest
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from tests.server.adapters.helpers import CHUNKS
from tests.server.http.helpers import running
from weaver.errors import NotFoundError
from weaver.protocol import CreateModel, ModelCreated
from weaver.server.adapters import ADAPTERS
from weaver.server.adapters.weaver_rest.answers import sampling_session_of
from weaver.server.http.app import App
from weaver.server.http.caller_session import CallerDep, Note
from weaver.server.http.gateway import Adapter
from weaver.server.settings import SERVED, Limits

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    import httpx

    from tests.server.http.helpers import Server
    from weaver.server.http.errors import Refusal

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


# --- the wire format ----------------------------------------------------------------------------

router = APIRouter(prefix="/api/v1", include_in_schema=False)


@router.get("/ping")
async def ping() -> str:
    return "pong"


@router.post("/create")
async def create(request: Request, caller: CallerDep) -> dict[str, str]:
    name = (await request.body()).decode()
    key = request.headers.get("X-Attempt")
    created = await caller.carry_out(CreateModel(base_model=name), Note(key=key))
    assert isinstance(created, ModelCreated)
    return {"run": created.run.run_id}


@router.get("/count/{number}")
async def count(number: int) -> int:
    return number


@router.get("/lost")
async def lost() -> None:
    raise NotFoundError("it is lost.")


@router.get("/broken")
async def broken() -> None:
    raise RuntimeError("a secret")


@router.get("/sampling-sessions/x/samples")
@router.get("/models")
async def shared() -> str:
    """Weaver REST only posts to the first, and has the second too."""
    return "shared"


SHARED = "/api/v1/sampling-sessions/x/samples"


def failed(refusal: Refusal) -> JSONResponse:
    return JSONResponse({"failed": refusal.error.code}, status_code=min(refusal.status, 499))


OTHER = Adapter(
    routes=router.routes,
    prefix="/api/v1",
    envelope=failed,
    body_limits={"text/long": 5000, "": 100},
    open_paths=("/api/v1/ping",),
)

# --- beside Weaver REST -------------------------------------------------------------------------

FIRST, LAST = (OTHER, *ADAPTERS), (*ADAPTERS, OTHER)


@asynccontextmanager
async def beside(
    home: Path, adapters: Sequence[Adapter], *, auth: bool = False, limits: Limits = SERVED
) -> AsyncIterator[tuple[Server, httpx.AsyncClient]]:
    async with running(home, auth=auth, limits=limits) as server:
        server = type(server)(
            app=App(server.gateway, adapters),
            gateway=server.gateway,
            service=server.service,
            keys=server.keys,
        )
        async with server.http() as http:
            yield server, http


async def slowly() -> AsyncIterator[bytes]:
    for _ in range(9):
        yield b"x" * 2**22


BASE = f"/api/v1/sampling-sessions/{sampling_session_of('base:fake')}"
SESSION = f"/api/v1/sessions/{UUID(int=7)}"
REST: list[tuple[str, str, dict[str, Any], int]] = [
    ("GET", "/api/v1/nowhere", {}, 404),
    ("GET", "/api/v1", {}, 404),
    ("POST", "/api/v1/nowhere", {"content": b"x" * 2**26}, 413),
    ("GET", "/api/v1/pin", {}, 404),
    ("GET", "/api/v1/ping/pong", {}, 404),
    ("PUT", "/api/v1/operations/x", {}, 405),
    ("DELETE", SESSION, {}, 405),
    ("PUT", "/api/v1/models", {}, 405),
    ("GET", "/api/v1/operations/x", {}, 404),
    ("GET", "/api/v1/models/x", {}, 404),
    ("GET", SESSION, {}, 200),
    ("GET", "/api/v1/sessions/x", {}, 422),
    ("GET", "/api/v1/supported-models", {}, 200),
    ("POST", "/api/v1/sessions", {"content": b'{"x": "' + b"x" * 6000 + b'"}'}, 201),
    ("POST", "/api/v1/sessions", {"content": b"{"}, 400),
    ("POST", "/api/v1/sessions", {"content": b"x" * 2**26}, 413),
    ("POST", "/api/v1/sessions", {"content": slowly}, 413),
    ("POST", "/api/v1/quota/balance", {}, 422),
    ("GET", "/api/v1/downloads/x/y", {}, 403),
    ("POST", f"{BASE}/samples", {"json": {"prompt": CHUNKS}}, 429),
    ("GET", "/api/v1/model-catalog?limit=1", {}, 500),
]


async def ask(http: httpx.AsyncClient, method: str, path: str, given: dict[str, Any]) -> Any:
    """Status, headers and body, but for what differs from one request to the next."""
    content = given.get("content")
    given = given | {"content": content()} if callable(content) else given
    reply = await http.request(method, path, **given)
    headers = [pair for pair in reply.headers.items() if pair[0] != "x-request-id"]
    ids = r"[0-9a-f]{32}|[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}"
    return reply.status_code, headers, re.sub(ids, "ID", reply.text)


def break_catalog(monkeypatch: pytest.MonkeyPatch) -> None:
    """`/model-catalog` and `/supported-models` are one route."""

    def defect(*args: object) -> None:
        raise RuntimeError("a secret")

    monkeypatch.setattr("weaver.server.adapters.weaver_rest.routes._page", defect)


@pytest.mark.parametrize("case", REST, ids=lambda case: f"{case[0]} {case[1]} {case[3]}")
async def test_weaver_rest_answers_as_if_it_were_alone(
    home: Path, monkeypatch: pytest.MonkeyPatch, case: tuple[str, str, dict[str, Any], int]
) -> None:
    method, path, given, status = case
    if status == 500:
        break_catalog(monkeypatch)
    limits = Limits(pending_operations=0) if status == 429 else SERVED
    async with beside(home, ADAPTERS, limits=limits) as (_, http):
        alone = await ask(http, method, path, given)
    assert alone[0] == status
    async with beside(home, LAST, limits=limits) as (_, http):
        assert await ask(http, method, path, given) == alone


async def test_nobody_else_is_let_in_with_either(home: Path) -> None:
    async with beside(home, LAST, auth=True) as (server, http):
        assert (await http.get("/api/v1/ping")).json() == "pong"
        for path in ("/api/v1/lost", SHARED, "/api/v1/count/1"):
            reply = await http.get(path)
            assert (reply.status_code, reply.json()) == (401, {"failed": "unauthenticated"})
        for path in ("/api/v1/models", "/api/v1/nowhere", "/api/v1/ping/x", "/api/v1/pin"):
            reply = await http.get(path)
            assert (reply.status_code, reply.json()["error"]) == (401, "unauthenticated")
            assert reply.headers["WWW-Authenticate"] == "Bearer"
        assert (await http.get("/api/v1/downloads/x/y")).status_code == 403
        key = server.keys.create("a")[1]
    async with beside(home, ADAPTERS, auth=True) as (_, http):
        assert (await http.get("/api/v1/ping")).status_code == 401
        reply = await http.get("/api/v1/ping", headers={"Authorization": f"Bearer {key}"})
        assert reply.status_code == 404


async def test_the_other_has_its_own_envelope_and_limits(home: Path) -> None:
    long = {"Content-Type": "text/long; charset=utf-8"}
    asked: list[tuple[str, str, dict[str, Any], int, str]] = [
        ("GET", "/api/v1/lost", {}, 404, "not_found"),
        ("DELETE", "/api/v1/ping", {}, 405, "invalid_request"),
        ("GET", "/api/v1/count/x", {}, 422, "invalid_request"),
        ("GET", "/api/v1/broken", {}, 499, "engine_error"),
        ("POST", "/api/v1/create", {"content": b"x" * 101}, 413, "too_large"),
        ("POST", "/api/v1/create", {"content": slowly}, 413, "too_large"),
        ("POST", "/api/v1/create", {"content": b"x" * 5001, "headers": long}, 413, "too_large"),
        (
            "POST",
            "/api/v1/create",
            {"content": b"x" * 5000, "headers": long},
            422,
            "invalid_params",
        ),
        ("POST", "/api/v1/create", {"content": b"none"}, 404, "unknown_model"),
    ]
    async with beside(home, LAST) as (server, http):
        for method, path, given, status, code in asked:
            found = await ask(http, method, path, given)
            assert (found[0], found[2]) == (status, f'{{"failed":"{code}"}}'), path
        page = {"Origin": "http://elsewhere"}
        assert (await http.get("/api/v1/lost", headers=page)).json() == {
            "failed": "permission_denied"
        }
        server.gateway.stop()
        assert (await http.get("/api/v1/lost")).json() == {"failed": "connection_failed"}
        assert (await http.get("/api/v1/models")).json()["error"] == "connection_failed"
    async with beside(home, LAST, limits=Limits(pending_operations=0)) as (_, http):
        found = await ask(http, "POST", "/api/v1/create", {"content": b"fake"})
        assert (found[0], found[2]) == (429, '{"failed":"quota_exceeded"}')


async def test_what_both_have_belongs_to_the_first(home: Path) -> None:
    async with beside(home, LAST) as (_, http):
        assert (await http.get("/api/v1/models")).json()["items"] == []
        assert (await http.get(SHARED)).json() == "shared"
        assert (await http.post("/api/v1/sessions", json={})).status_code == 201
        assert (await http.get("/api/v1/nowhere")).json()["error"] == "not_found"
        assert f'route="{SHARED}"' in (await http.get("/metrics")).text
    async with beside(home, FIRST) as (_, http):
        assert (await http.get("/api/v1/models")).json() == "shared"
        assert (await http.get("/api/v1/models/x")).json()["error"] == "run_not_found"
        assert (await http.get("/api/v1/nowhere")).json() == {"failed": "not_found"}


async def test_both_see_one_session_of_their_caller(home: Path) -> None:
    again = {"X-Attempt": "one"}
    async with beside(home, LAST) as (server, http):
        made = (await http.post("/api/v1/create", content=b"fake", headers=again)).json()["run"]
        run = (await http.get(f"/api/v1/models/{made}")).json()
        assert (run["id"], run["base_model"]) == (made, "fake")
        [session] = await server.service.list_sessions()
    async with beside(home, LAST) as (server, http):  # the journal has its key
        resent = await http.post("/api/v1/create", content=b"fake", headers=again)
        assert resent.json()["run"] == made
        assert [one.session_id for one in await server.service.list_sessions()] == [
            session.session_id
        ]
