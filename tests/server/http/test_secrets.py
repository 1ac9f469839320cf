"""A key, a download's address and a database's password appear in no log, answer, file or error."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.fake_engine import FakeEngine
from tests.server.http.helpers import serving
from weaver import Datum, ServiceClient
from weaver.errors import ConfigError, WeaverError
from weaver.server.database import open_database
from weaver.server.http.telemetry import JsonFormatter
from weaver.server.keys import Keys
from weaver.server.settings import ServerSettings

if TYPE_CHECKING:
    from pathlib import Path

DATUM = Datum(model_input=[5, 6, 7], loss_fn_inputs={"target_tokens": [6, 7, 8]})


def test_a_whole_flow_tells_nobody_its_key(
    home: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = open_database(home)
    keys = [Keys(database).create("mine", admin=admin)[1] for admin in (False, True)]
    database.dispose()
    said: list[str] = []
    with (
        caplog.at_level(logging.DEBUG),
        serving(FakeEngine(), ServerSettings(home=home, port=0)) as server,
    ):
        for key in keys:
            with ServiceClient(base_url=server.address, api_key=key) as service:
                said += [repr(service), *train(service)]
            for wrong in (f"{key}x", f"{key}\n", f"{key}é"):
                with pytest.raises(WeaverError) as refused:
                    ServiceClient(base_url=server.address, api_key=wrong).create_model("fake")
                said += [str(refused.value), repr(refused.value)]
            said += rest(server.address, key)
        address = next(word for word in " ".join(said).split('"') if "/downloads/" in word)
    signature = address.split("/downloads/")[1].split("/")[0]
    form = JsonFormatter()
    logged = {name: list[str]() for name in ("client", "server")}
    for record in caplog.records:
        side = "client" if record.name.startswith("http") else "server"
        logged[side].append(f"{form.format(record)} {record.args} {record.__dict__}")
    assert any("/v1/sessions" in line for line in logged["server"])
    assert any("/downloads/" in line for line in logged["server"])
    assert not [line for line in logged["server"] if signature in line]
    assert not [line for key in keys for lines in logged.values() for line in lines if key in line]
    assert not [text for text in said for key in keys if key in text]
    for path in home.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        assert not [key for key in keys if key.encode() in content], path


def train(service: ServiceClient) -> list[str]:
    """The native flow; what was answered."""
    trainer = service.create_model("fake", {"rank": 2})
    passed = trainer.forward_backward([DATUM], loss_fn="cross_entropy", wait=True)
    step = trainer.optim_step({"learning_rate": 0.1}, wait=True)
    sampler = trainer.save_weights_and_get_sampling_client()
    reply = sampler.sample([5, 6], {"max_tokens": 2})
    with pytest.raises(WeaverError) as refused:
        trainer.load_state("weaver://nobody/weights/x", wait=True)
    return [str(each) for each in (passed, step, reply, repr(refused.value), trainer.save_state())]


def rest(address: str, key: str) -> list[str]:
    """The other interface and bad requests; what was answered, headers included."""
    with httpx.Client(base_url=address, headers={"X-WEAVER-API-KEY": key}) as http:
        replies = [http.post("/api/v1/sessions", json={}), http.get("/api/v1/models")]
        session, model = (reply.json() for reply in replies)
        model_id = model["items"][0]["id"]
        saved = http.post(f"/api/v1/models/{model_id}/export-hf", json={})
        artifact = saved.json()["response"]["id"]
        described = http.get(f"/api/v1/artifacts/{artifact}/download")
        replies += [saved, described, http.get(described.json()["files"][0]["url"])]
        replies += [
            http.get(f"/api/v1/operations/{session['id']}"),
            http.post("/api/v1/organizations", json={}),
            http.get("/v1/nothing"),
            http.get("/metrics"),
            http.post("/v1/sessions", content=b"{"),
            http.post(f"/v1/sessions/{session['id']}/submissions", content=b"x"),
        ]
    assert {200, 201, 404, 415, 422} <= {reply.status_code for reply in replies}
    return [f"{reply.headers} {reply.content!r}" for reply in replies]


def test_the_password_of_a_database_is_not_told(home: Path) -> None:
    urls = (
        "postgresql://weaver:s3cret@127.0.0.1:1/weaver",
        "postgresql://weaver:s3cret@[broken/weaver",
        "nosuch://weaver:s3cret@host/weaver",
    )
    for url in urls:
        with pytest.raises(ConfigError) as caught:
            open_database(home, url)
        assert "s3cret" not in repr(caught.value) + str(caught.value)
        assert "s3cret" not in repr(ServerSettings(home=home, database_url=url))
