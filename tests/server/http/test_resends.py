"""What was done for a request is not done again for its resend, by whatever process."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
