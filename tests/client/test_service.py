"""The service client: opening, closing, what is embedded, and errors of the block."""

from __future__ import annotations

import builtins
import logging
import sys
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from tests.client.helpers import DATUMS, STEP, fake_client
from tests.fake_engine import FakeEngine
from weaver import AsyncServiceClient
from weaver.client import opening
from weaver.errors import (
    ClosedError,
    ConfigError,
    InvalidParamsError,
    MissingDependencyError,
    ServiceConnectionError,
)
from weaver.server.service import LocalService

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.anyio


async def test_calls_before_the_block_say_how_to_open_it() -> None:
    client = AsyncServiceClient()
    with pytest.raises(ClosedError, match="async with"):
        client.create_model("fake")
    with pytest.raises(ClosedError, match="async with"):
        await client.list_training_runs()


async def test_calls_after_the_block_are_refused(tmp_path: Path) -> None:
    async with fake_client(tmp_path) as client:
        trainer = await client.create_model("fake")
        pending = trainer.forward_backward(DATUMS)
        await client.close()
        with pytest.raises(ClosedError):
            await pending
        with pytest.raises(ClosedError):
            trainer.optim_step(STEP)
    with pytest.raises(ClosedError):
        await client.list_supported_models()


async def test_errors_of_the_block_come_out_unwrapped(tmp_path: Path) -> None:
    local = LocalService(FakeEngine(), home=tmp_path)
    service = await local.__aenter__()
    with pytest.raises(ZeroDivisionError):
        async with AsyncServiceClient(service=service):
            raise ZeroDivisionError
    await local.__aexit__(None, None, None)


async def test_a_cancelled_block_closes(tmp_path: Path) -> None:
    with anyio.CancelScope() as scope:
        async with fake_client(tmp_path) as client:
            await client.create_model("fake")
            scope.cancel()
            await anyio.sleep_forever()
    assert scope.cancelled_caught
    with pytest.raises(ClosedError):
        client.create_model("fake")


async def test_an_injected_service_stays_open(tmp_path: Path) -> None:
    async with LocalService(FakeEngine(), home=tmp_path) as service:
        async with AsyncServiceClient(service=service, home=tmp_path) as client:
            model_id = (await client.create_model("fake")).model_id
        async with AsyncServiceClient(service=service, home=tmp_path) as client:
            trainer = await client.attach(model_id)
            trainer.forward_backward(DATUMS)
            assert (await trainer.optim_step(STEP)).metrics["step"] == 1


async def test_embedded_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WEAVER_HOME", str(tmp_path))
    monkeypatch.setattr(opening, "_torch_engine", lambda settings: FakeEngine())
    caplog.set_level(logging.INFO, "weaver")
    async with AsyncServiceClient() as client:
        saved = await (await client.create_model("fake")).save_state("a")
    assert [r.message for r in caplog.records if "fake engine" in r.message] == [
        f"running embedded: fake engine, saving below {tmp_path}"
    ]
    assert saved.folder is not None and saved.folder.startswith(str(tmp_path))


@pytest.mark.parametrize("broken", [False, True])
async def test_without_torch_it_says_what_to_install(
    broken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_import = builtins.__import__

    def no_torch(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "weaver.engine.torch.engine":
            if broken:
                raise ImportError("libtorch.so: cannot open shared object file", name="torch._C")
            raise ModuleNotFoundError("No module named 'torch.nn'", name="torch.nn")
        return true_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_torch)
    monkeypatch.delitem(sys.modules, "weaver.engine.local", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)  # as if it were not installed
    with pytest.raises(ImportError) as raised:
        async with AsyncServiceClient():
            pass
    assert isinstance(raised.value, MissingDependencyError) is not broken
    if broken:  # nothing is missing, and installing what is there would not help
        assert str(raised.value) == "libtorch.so: cannot open shared object file"
    else:
        assert str(raised.value) == (
            'the embedded engine needs torch. Run: pip install "weaver-post-training[engine]"'
        )


async def test_a_server_out_of_reach_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weaver.client.http.FIRST_CONTACT_S", 0.2)
    with pytest.raises(ServiceConnectionError, match=r"http://localhost:1 .*weaver serve"):
        async with AsyncServiceClient("http://localhost:1"):
            pass
    monkeypatch.setenv("WEAVER_BASE_URL", "http://localhost:1")
    with pytest.raises(ServiceConnectionError, match="http://localhost:1"):
        async with AsyncServiceClient():
            pass


async def test_an_address_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidParamsError, match="base_url"):
        AsyncServiceClient("localhost:1")
    monkeypatch.setenv("WEAVER_BASE_URL", "localhost")
    with pytest.raises(ConfigError, match="WEAVER_BASE_URL"):
        AsyncServiceClient()
