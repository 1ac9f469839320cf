"""`weaver serve` as a process: it starts, answers, and leaves when it is told to."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import httpx
import pytest
from typer.testing import CliRunner

from tests.contracts.caller import Caller
from tests.fake_engine import FakeEngine
from weaver.cli import app
from weaver.client.http import HttpService
from weaver.engine.torch.engine import TorchEngine
from weaver.errors import ConfigError
from weaver.protocol import OpenSampler, SamplerOpened
from weaver.server.http import telemetry
from weaver.server.serve import run_server
from weaver.server.settings import ServerSettings

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class Server:
    process: subprocess.Popen[str]
    address: str
    log: list[str]
    """Its lines; whole once the process has ended."""


WEAVER = [sys.executable, "-c", "from weaver.cli import main; main()"]


@contextmanager
def serve(home: Path, *arguments: str, **settings: str) -> Iterator[Server]:
    """A server process, and all that it says: its pipe is read to the end, so it never fills."""
    environment = {**os.environ, "WEAVER_HOME": str(home), "WEAVER_PORT": "0", **settings}
    process = subprocess.Popen(
        [*WEAVER, "serve", *arguments], stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stderr is not None
    log: list[str] = []
    address = ""
    for line in process.stderr:
        log.append(line)
        if line.startswith("Weaver at "):
            address = line.split()[2]
            break
    reader = threading.Thread(target=log.extend, args=[process.stderr])
    reader.start()
    try:
        assert address, f"it ended before it listened: {log}"
        yield Server(process, address, log)
    finally:
        process.kill()
        process.wait()
        reader.join()
        process.stderr.close()


@pytest.mark.slow
def test_a_server_starts_answers_and_leaves(home: Path) -> None:
    made = subprocess.run(
        [*WEAVER, "keys", "create", "--project", "p", "--home", str(home)],
        capture_output=True,
        text=True,
        check=True,
    )
    secret = made.stdout.strip()
    with serve(home, "--log-json", WEAVER_THREADS="1") as server:
        assert httpx.get(f"{server.address}/v1/base-models").status_code == 401

        async def use() -> None:
            async with HttpService(server.address, api_key=secret) as service:
                assert [m.name for m in await service.list_models()] == ["weaver-nano"]
                caller = await Caller.open(service)
                await caller.do(OpenSampler(base_model="weaver-nano"), SamplerOpened)
                run = await caller.create("weaver-nano")
                assert (await service.get_run(run)).base_model == "weaver-nano"
                assert "tokenizer.json" in await service.tokenizer_files("weaver-nano")
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(stop_while_polled)
                    await service._http.get(  # a long poll, which must not hold the server up
                        f"sessions/{caller.session_id}/outcomes",
                        params={"after": caller.cursor, "timeout": 25},
                        timeout=30,
                    )

        async def stop_while_polled() -> None:
            await anyio.sleep(0.3)
            server.process.send_signal(signal.SIGTERM)

        began = time.monotonic()
        anyio.run(use)
        assert server.process.wait(15) == 0
        assert time.monotonic() - began < 60
    log = "".join(server.log)
    assert secret not in log and "Traceback" not in log
    lines = [json.loads(line) for line in server.log if line.startswith("{")]
    asked = [line for line in lines if line.get("path") in ("/v1/base-models", "/v1/sessions")]
    assert [line["status"] for line in asked] == [401, 201]  # what only reads is not told of
    assert all(len(line["request_id"]) == 32 for line in asked)


def test_the_engine_is_closed_however_the_server_ends(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[TorchEngine] = []
    monkeypatch.setattr(TorchEngine, "close", lambda engine: closed.append(engine))
    # It would be for this whole process.
    monkeypatch.setattr(telemetry, "configure_logs", lambda **how: None)
    given = ["--port=0", "--otel-endpoint=collector:4318", f"--home={home}"]
    result = CliRunner().invoke(app, ["serve", *given])
    assert isinstance(result.exception, ConfigError)
    assert len(closed) == 1
    assert f"computing with {closed[0].description}" in result.stderr


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"host": "0.0.0.0", "auth": False}, "keys are off"),
        ({"host": "203.0.113.1"}, "cannot listen on 203.0.113.1"),
        ({"host": "no.such.host.invalid"}, "cannot listen"),
        ({"otel_endpoint": "collector:4318"}, "otel_endpoint: is 'collector:4318'.*http://"),
        ({"host": ""}, "host: is empty"),  # would be every address of the machine
        ({"home": Path("/proc/nowhere")}, r"home: /proc/nowhere cannot be written to.*--home"),
    ],
)
def test_a_server_that_cannot_start_says_why(
    home: Path, settings: dict[str, object], message: str
) -> None:
    chosen = ServerSettings(**{"home": home, "port": 0, **settings})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message):
        asyncio.run(run_server(FakeEngine(), chosen, started=lambda running: running.stop()))


@pytest.mark.parametrize(
    "option",
    [
        "port=65536",
        "port=-1",
        "threads=-1",
        "snapshot-every=-1",
        "snapshot-every=nan",
        "snapshot-every-steps=0",
        "idle-run-seconds=nan",
        "session-timeout=119",
    ],
)
def test_a_number_that_makes_no_sense_is_refused(option: str, home: Path) -> None:
    result = CliRunner().invoke(app, ["serve", f"--{option}", "--host=", f"--home={home}"])
    name = option.partition("=")[0]
    variable = f"WEAVER_{name.upper().replace('-', '_')}"
    assert result.exit_code == 2
    assert f"Invalid value for '--{name}' (env var: '{variable}')" in result.output


@pytest.mark.parametrize("name", ["with space", "a?b=c#d", "100%41", "naïve-家"])
def test_any_folder_can_be_a_home(name: str, home: Path) -> None:
    chosen = ServerSettings(home=home / name, port=0)
    asyncio.run(run_server(FakeEngine(), chosen, started=lambda running: running.stop()))
    assert (home / name / "server.db").stat().st_size > 0


def test_a_taken_port_is_named(home: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        chosen = ServerSettings(home=home, port=taken.getsockname()[1])
        with pytest.raises(ConfigError, match=r"Address already in use.*--port"):
            asyncio.run(run_server(FakeEngine(), chosen, started=lambda running: running.stop()))
