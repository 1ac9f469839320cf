"""What the console asks of the server: operations, curves and load, and who may see them."""

from __future__ import annotations

import re
import threading
from typing import TYPE_CHECKING

import pytest
from anyio import to_thread

import weaver
from tests.contracts.caller import BAD_GRADIENT, FORWARD, GRADIENT, STEP, Caller
from tests.fake_engine import FakeEngine
from tests.server.http.helpers import running
from weaver.protocol import GradientsDone, Sample, Sampled, StepDone
from weaver.server.console import thin
from weaver.server.machine import size_bytes
from weaver.types import MetricPoint, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tests.server.http.helpers import Server
    from weaver.engine.base import GradientJob
    from weaver.errors import WeaverError
    from weaver.types import ForwardBackwardResult

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_the_pages_need_no_key_and_run_only_their_own_scripts(home: Path) -> None:
    async with running(home, auth=True) as server, server.http() as http:
        for path in ("/", "/docs"):
            page = await http.get(path)
            policy = page.headers["Content-Security-Policy"]
            assert page.status_code == 200 and "default-src 'self'" in policy
            assert "unsafe" not in policy
            links = re.findall(r'(?:src|href)="([^"#]+)"', page.text)
            assert any(link.endswith(".js") for link in links)
            for link in links:
                assert (await http.get(f"/{link}")).status_code == 200, link
                assert not link.startswith(("http", "//", "/")), "works below a proxy's prefix"
        for lost in ("/console/nothing.js", "/console/", "/console/%2e%2e/routes.py"):
            assert (await http.get(lost)).status_code == 404
        assert (await http.get("/v1/caller")).status_code == 401


async def test_operations_are_seen_waiting_then_ended(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    engine = FakeEngine()
    train = engine.trainer.forward_backward

    def held(jobs: Sequence[GradientJob]) -> Sequence[ForwardBackwardResult | WeaverError]:
        begun.set()
        go_on.wait(20)
        return train(jobs)

    monkeypatch.setattr(engine.trainer, "forward_backward", held)
    async with running(home, engine=engine) as server, server.http() as http:
        async with server.client() as service:
            caller = await Caller.open(service)
            run = await caller.create()
            ids = [await caller.start(one, run) for one in (GRADIENT, STEP, FORWARD)]
            url = f"/v1/runs/{run}/operations"
            assert await to_thread.run_sync(begun.wait, 20)
            seen = (await http.get(url)).json()
            assert [(one["kind"], one["state"], one["seq"]) for one in seen["pending"]] == [
                ("forward_backward", "running", 1),
                ("optim_step", "waiting", 2),
                ("forward", "waiting", 3),
            ]
            load = (await http.get("/v1/load")).json()
            assert (load["running"], load["waiting"]) == (1, 2) and load["longest_wait_s"] > 0
            [tenant] = load["tenants"]
            assert tenant["longest_wait_s"] == load["longest_wait_s"]
            cluster = (await http.get("/v1/cluster")).json()
            [lane] = cluster["lanes"]
            assert lane.pop("longest_wait_s") > 0
            assert lane == {"lane": "", "runs": 1, "waiting": 2, "running": 1}
            assert cluster["ray"] == "" and cluster["groups"] == cluster["samplers"] == []
            assert (
                'weaver_operations_pending{state="waiting"} 2.0'
                in (await http.get("/metrics")).text
            )
            go_on.set()
            for one in ids:
                await caller.outcome(one)
            assert await caller.refused(BAD_GRADIENT, run_id=run) == "token_out_of_range"
        ended = (await http.get(url)).json()
        assert ended["pending"] == [] and ended["num_pending"] == 0
        assert [(one["kind"], one["state"], one["step"]) for one in ended["ended"]] == [
            ("forward_backward", "failed", 1),
            ("forward", "done", 1),
            ("optim_step", "done", 1),
            ("forward_backward", "done", 0),
            ("create_model", "done", 0),
        ]
        assert ended["ended"][0]["error"]["code"] == "token_out_of_range"
        assert ended["ended"][2]["waited_s"] > 0 and "grad_norm" in ended["ended"][2]["metrics"]


async def test_curves_hold_what_was_logged_and_what_operations_answered(home: Path) -> None:
    async with running(home) as server, server.http() as http, server.client() as service:
        caller = await Caller.open(service)
        run = await caller.create()
        for _ in range(3):
            await caller.do(GRADIENT, GradientsDone, run_id=run)
            await caller.do(STEP, StepDone, run_id=run)
        points = [MetricPoint(name="reward", value=i / 1000, step=i) for i in range(1000)]
        await service.log_metrics(run, [*points, MetricPoint(name="unnumbered", value=2)])
        reply = (await http.get(f"/v1/runs/{run}/curves", params={"points": 100})).json()
        curves = {(curve["source"], curve["name"]): curve for curve in reply}
        reward = curves["logged", "reward"]
        assert len(reward["points"]) <= 100 and reward["total"] == 1000
        assert reward["points"][0] == [0, 0] and reward["points"][-1] == [999, 0.999]
        assert curves["logged", "unnumbered"]["points"] == [[0, 2]]
        assert [step for step, _ in curves["forward_backward", "loss"]["points"]] == [1, 2, 3]
        assert [step for step, _ in curves["optim_step", "grad_norm"]["points"]] == [1, 2, 3]


def test_a_home_is_counted_by_its_files_each_once(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "a").write_bytes(bytes(1000))
    (tmp_path / "inner" / "same").hardlink_to(tmp_path / "a")
    (tmp_path / "inner" / "b").write_bytes(bytes(234))
    assert size_bytes(tmp_path) == 1234
    assert size_bytes(tmp_path / "not there") == 0


def test_thinning_keeps_the_extremes() -> None:
    points = [(float(i), 0.0) for i in range(10_000)]
    points[1234], points[8000] = (1234.0, 9.0), (8000.0, -9.0)
    shown = thin(points, 100)
    assert len(shown) <= 100 and (1234.0, 9.0) in shown and (8000.0, -9.0) in shown
    assert list(shown) == sorted(shown)
    assert thin(points[:100], 100) == points[:100]


async def test_load_names_tenants_to_administrators_only(home: Path) -> None:
    async with running(home, auth=True) as server:
        alice, bob, ops = (
            server.keys.create(name, admin=name == "ops")[1] for name in ("alice", "bob", "ops")
        )
        async with server.client(alice) as service:
            caller = await Caller.open(service)
            run = await caller.create()
            await caller.do(GRADIENT, GradientsDone, run_id=run)
            path = await caller.save(run, "sampler", name="x")
            params = SamplingParams(max_tokens=4, seed=0, ignore_eos=True)
            sample = Sample(sampler_id=path, prompt="x", params=params)
            await caller.do(sample, Sampled)
        await check_load(server, alice=alice, bob=bob, ops=ops, run=run)


async def check_load(server: Server, *, alice: str, bob: str, ops: str, run: str) -> None:
    for key, project, admin in ((alice, "alice", False), (ops, "ops", True)):
        async with server.http(key) as http:
            assert (await http.get("/v1/caller")).json() == {"project": project, "admin": admin}
            for route in ("load", "cluster"):
                assert (await http.get(f"/v1/{route}")).status_code == (200 if admin else 403)
    async with server.http(ops) as http:
        load = (await http.get("/v1/load")).json()
        tenants = {tenant["project"]: tenant for tenant in load["tenants"]}
        assert list(tenants) == ["alice", "bob", "ops"]
        assert tenants["alice"]["runs"] == 1 and tenants["alice"]["stored_bytes"] > 0
        assert tenants["bob"]["runs"] == tenants["bob"]["stored_bytes"] == 0
        assert load["trained_tokens"] == 10 and load["sampled_tokens"] == 4
        assert load["prompt_tokens"] > 0 and load["reused_prompt_tokens"] == 0
        assert tenants["alice"]["longest_wait_s"] == 0
        machine = load["machine"]
        assert machine["version"] == weaver.__version__ and machine["device"] == "fake engine"
        assert 0 < machine["process_bytes"] < machine["memory_bytes"]
        assert 0 < machine["memory_free_bytes"] < machine["memory_bytes"]
        assert machine["device_bytes"] is machine["device_free_bytes"] is None
        assert 0 < machine["disk_free_bytes"] < machine["disk_bytes"]
        assert machine["uptime_s"] > 0
        assert machine["home_bytes"] > tenants["alice"]["stored_bytes"]
        metrics = (await http.get("/metrics")).text
        assert 'weaver_tokens_total{kind="sampled"} 4.0' in metrics
        prompts = float(load["prompt_tokens"])
        assert f"weaver_engine_prompt_tokens_total {prompts}" in metrics
        sampled = (await http.get(f"/v1/runs/{run}/operations")).json()["ended"][0]
        assert sampled["kind"] == "sample" and sampled["metrics"] == {"tokens": 4}
    async with server.http(bob) as http:
        for route in ("operations", "curves"):
            reply = await http.get(f"/v1/runs/{run}/{route}")
            assert reply.json()["error"]["code"] == "run_not_found" and reply.status_code == 404
