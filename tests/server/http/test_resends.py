"""What was done for a request is not done again for its resend, by whatever process."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import httpx
import pytest

from tests.contracts.caller import Caller
from tests.server.http.helpers import running
from tests.server.http.test_http_service import NOT_FOUND, scripted
from weaver.errors import RunNotFoundError

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.anyio
POINTS = {"points": [{"name": "reward", "value": 1.0, "step": 1}]}


async def test_metrics_that_are_sent_again_after_a_restart_are_there_once(home: Path) -> None:
    sent = {"Idempotency-Key": "one"}
    async with running(home) as server:
        run = await (await Caller.open(server.service)).create()
        path = f"/v1/runs/{run}/metrics"
        async with server.http() as http:
            assert (await http.post(path, json=POINTS, headers=sent)).status_code == 204
    async with running(home) as server, server.http() as http:
        assert (await http.post(path, json=POINTS, headers=sent)).status_code == 204
        assert len((await http.get(path)).json()) == 1
        other = {"Idempotency-Key": "two"}
        assert (await http.post(path, json=POINTS, headers=other)).status_code == 204
        for _ in range(2):  # without a key each is a request of its own
            assert (await http.post(path, json=POINTS)).status_code == 204
        assert len((await http.get(path)).json()) == 4


async def test_every_change_is_made_once_whichever_process_is_asked_again(home: Path) -> None:
    async with running(home) as server:
        caller = await Caller.open(server.service)
        run, lost = await caller.create(), await caller.create()
        kept, gone = [await caller.save(run, "state", name=name) for name in ("kept", "gone")]
        closed = (await server.service.open_session()).session_id
        requests: list[tuple[str, str, dict[str, object] | None, int]] = [
            ("POST", "/v1/sessions", {}, 201),
            ("DELETE", f"/v1/sessions/{closed}", None, 204),
            ("DELETE", f"/v1/runs/{lost}?checkpoints=true", None, 204),
            ("DELETE", f"/v1/checkpoints?path={gone}", None, 204),
            ("PUT", f"/v1/checkpoints/ttl?path={kept}", {"ttl_seconds": 1000}, 200),
            ("DELETE", "/v1/sessions/none", None, 404),
            ("DELETE", "/v1/runs/none", None, 404),
            ("DELETE", f"/v1/checkpoints?path={kept}-not", None, 404),
        ]

        async def ask(http: httpx.AsyncClient, name: str) -> list[tuple[int, str]]:
            replies = []
            for number, (method, path, body, _) in enumerate(requests):
                headers = {"Idempotency-Key": f"{name}{number}"}
                reply = await http.request(method, path, json=body, headers=headers)
                text = reply.text.replace(reply.headers["X-Request-ID"], "")
                replies.append((reply.status_code, text))
            return replies

        async with server.http() as http:
            first = await ask(http, "first")
            assert [status for status, _ in first] == [request[3] for request in requests]
            assert await ask(http, "first") == first
        await server.service.set_checkpoint_ttl(kept, None)
    async with running(home) as server, server.http() as http:
        again = await ask(http, "first")
        assert [status for status, _ in again] == [status for status, _ in first]
        assert again[0] == first[0]
        assert (await server.service.get_checkpoint(kept)).ttl_seconds is None
        assert len(await server.service.list_sessions()) == 2
        fresh = [status for status, _ in await ask(http, "fresh")]
        assert fresh == [201, 404, 404, 404, 200, 404, 404, 404]


async def test_a_removal_that_was_cut_off_is_made_by_its_resend(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = {"Idempotency-Key": "one"}
    async with running(home) as server, server.http() as http:
        path = f"/v1/runs/{await (await Caller.open(server.service)).create()}"

        async def cut_off(*args: object, **options: object) -> None:
            raise RuntimeError

        with monkeypatch.context() as patch:
            patch.setattr(server.service.parts.executor, "delete_run", cut_off)
            assert (await http.delete(path, headers=sent)).status_code == 500
    async with running(home) as server, server.http() as http:
        assert (await http.get(path)).status_code == 200
        for _ in range(2):
            assert (await http.delete(path, headers=sent)).status_code == 204
            assert (await http.get(path)).status_code == 404


async def test_resends_that_come_together_are_one_request(home: Path) -> None:
    statuses: list[int] = []
    async with running(home) as server, server.http() as http:
        path = f"/v1/runs/{await (await Caller.open(server.service)).create()}/metrics"

        async def send() -> None:
            reply = await http.post(path, json=POINTS, headers={"Idempotency-Key": "one"})
            statuses.append(reply.status_code)

        async with anyio.create_task_group() as tasks:
            for _ in range(8):
                tasks.start_soon(send)
        assert statuses == [204] * 8
        assert len((await http.get(path)).json()) == 1


@pytest.mark.parametrize("lost", [httpx.ReadError("lost"), httpx.Response(503)])
async def test_what_is_gone_when_it_is_deleted_again_was_deleted(
    lost: httpx.Response | Exception,
) -> None:
    for delete in ("run", "checkpoint"):
        service, seen = scripted(lost, httpx.Response(404, json=NOT_FOUND))
        await getattr(service, f"delete_{delete}")("weaver://run-1/weights/x")
        assert len(seen) == 2
    service, _ = scripted(httpx.Response(404, json=NOT_FOUND))
    with pytest.raises(RunNotFoundError):
        await service.delete_run("run-1")
    service, _ = scripted(lost, httpx.Response(404, json=NOT_FOUND))
    with pytest.raises(RunNotFoundError):
        await service.get_run("run-1")
