"""What the list of runs and the export button ask for: `/v1/overview` and archives."""

from __future__ import annotations

import io
import tarfile
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

from tests.contracts.caller import GRADIENT, STEP, Caller
from tests.server.console.many import fill
from tests.server.http.helpers import running
from weaver.protocol import CreateModel, GradientsDone, ModelCreated, Sample, Sampled, StepDone
from weaver.server import tables
from weaver.server.activity import OperationInfo
from weaver.server.console.overview import tokens_per_s
from weaver.server.database import open_database
from weaver.types import MetricPoint, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.postgres import Postgres

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def create(caller: Caller, name: str) -> str:
    made = await caller.do(CreateModel(base_model="fake", name=name), ModelCreated)
    return made.run.run_id


@pytest.mark.parametrize("on", ["sqlite", "postgresql"])
async def test_the_overview_tells_by_what_a_run_is_judged_to_those_who_may_see_it(
    on: str, home: Path, request: pytest.FixtureRequest
) -> None:
    url = request.getfixturevalue("postgres").emptied() if on == "postgresql" else None
    async with running(home, auth=True, url=url) as server:
        alice, bob, ops = (
            server.keys.create(name, admin=name == "ops")[1] for name in ("alice", "bob", "ops")
        )
        async with server.client(alice) as service:
            caller = await Caller.open(service)
            rewarded, silent = await create(caller, "rewarded"), await create(caller, "silent")
            points = [("reward/mean", 0.25), ("reward/mean", 0.5)]
            points += [("loss", 9.0), *((f"other/{i}", 1.0) for i in range(100))]
            logged = [MetricPoint(name=name, value=value, step=1) for name, value in points]
            await service.log_metrics(rewarded, logged)
        async with server.client(bob) as service:
            caller = await Caller.open(service)
            trained = await create(caller, "trained")
            await caller.do(GRADIENT, GradientsDone, run_id=trained)
            loss = (await caller.do(GRADIENT, GradientsDone, run_id=trained)).output.metrics["loss"]
            await caller.do(STEP, StepDone, run_id=trained)

        async def overview(key: str, **asked: object) -> dict[str, dict[str, object]]:
            async with server.http(key) as http:
                lines = (await http.get("/v1/overview", params=asked)).json()
            times = [line["last_request_at"] for line in lines["runs"]]
            assert times == sorted(times, reverse=True) and len(times) <= lines["total"] <= 3
            return {line["run_id"]: line for line in lines["runs"]}

        mine = await overview(alice)
        assert mine.keys() == {rewarded, silent}
        assert mine[rewarded]["telling"] == {"name": "reward/mean", "value": 0.5}
        assert mine[rewarded]["name"] == "rewarded" and mine[rewarded]["project"] == "alice"
        assert mine[silent]["telling"] is None and mine[silent]["tokens_per_s"] is None
        theirs = await overview(bob)
        assert theirs.keys() == {trained}
        assert theirs[trained]["telling"] == {"name": "loss", "value": pytest.approx(loss)}
        speed, step = theirs[trained]["tokens_per_s"], theirs[trained]["step"]
        assert isinstance(speed, float) and speed > 0 and step == 1
        assert (await overview(ops)).keys() == {rewarded, silent, trained}
        assert (await overview(ops, find="BOB  fake")).keys() == {trained}
        assert (await overview(alice, find="trained")).keys() == set()
        first, second = [await overview(ops, offset=n, limit=1) for n in (0, 1)]
        assert len(first) == len(second) == 1 and first != second


def test_postgresql_looks_for_a_runs_newest_numbers_once(home: Path, postgres: Postgres) -> None:
    """And not for each of its rows anew, which takes a second for a hundred runs."""
    url = postgres.emptied()
    fill(home, 3, url)
    ids = [f"run-{i:012d}" for i in range(3)]
    asked = tables.newest(tables.metrics, ids, tables.metrics.c.name != "", by="name")
    database = open_database(home, url)
    with database.begin() as connection:
        sql = asked.compile(connection, compile_kwargs={"literal_binds": True})
        [[plan]] = connection.scalars(sa.text(f"EXPLAIN (ANALYZE, FORMAT JSON) {sql}"))
    database.dispose()

    def looked(node: dict[str, Any]) -> Iterator[int]:
        if node.get("Parent Relationship") == "SubPlan":
            yield node["Actual Loops"]
        for inner in node.get("Plans", ()):
            yield from looked(inner)

    assert [*looked(plan["Plan"])] == [len(ids)]


def test_tokens_a_second_are_those_of_the_last_minute_of_work() -> None:
    def ended(at: float, tokens: float, *, ran_s: float = 2.0) -> OperationInfo:
        return OperationInfo(
            kind="forward_backward",
            state="done",
            session_id="",
            seq=1,
            submitted_at=datetime(2030, 1, 1, tzinfo=UTC) + timedelta(seconds=at),
            waited_s=1.0,
            ran_s=ran_s,
            metrics={"num_tokens": tokens} if tokens else {},
        )

    assert tokens_per_s([]) is None and tokens_per_s([ended(0, 0)]) is None
    assert tokens_per_s([ended(0, 100)]) == 50
    assert tokens_per_s([ended(0, 10_000), ended(1000, 100), ended(1008, 100)]) == 20
    assert tokens_per_s([ended(0, 100, ran_s=0.0)]) is None


async def test_an_archive_is_downloaded_without_a_key_by_who_was_given_its_address(
    home: Path,
) -> None:
    async with running(home, auth=True) as server:
        alice, bob = (server.keys.create(name)[1] for name in ("alice", "bob"))
        async with server.client(alice) as service:
            caller = await Caller.open(service)
            path = await caller.save(await create(caller, "a"), "sampler", name="last")
            sample = Sample(sampler_id=path, prompt="x", params=SamplingParams(max_tokens=1))
            await caller.do(sample, Sampled)
            export = await service.export_checkpoint(path)
        async with server.http(bob) as http:
            refused = await http.post("/v1/checkpoints/archive", params={"path": path})
            assert refused.status_code == 404
            assert refused.json()["error"]["code"] == "checkpoint_not_found"
        async with server.http(alice) as http:
            given = await http.post("/v1/checkpoints/archive", params={"path": path})
            url = given.json()["url"]
            assert given.status_code == 201 and not url.startswith(("/", "http"))
            assert given.json()["size_bytes"] == sum(file.size_bytes for file in export.files)
        async with server.http() as http:
            archive = await http.get(f"/{url}")
            lost = await http.get(f"/console/archives/{'x' * 43}/checkpoint.tar")
            assert (await http.post("/v1/checkpoints/archive?path=x")).status_code == 401
        assert archive.headers["Content-Disposition"] == "attachment"
        assert len(archive.content) == int(archive.headers["Content-Length"])
        with tarfile.open(fileobj=io.BytesIO(archive.content)) as files:
            sizes = {member.name: member.size for member in files.getmembers()}
        assert sizes == {file.name: file.size_bytes for file in export.files}
        assert lost.status_code == 403
