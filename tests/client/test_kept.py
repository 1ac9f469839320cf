"""A client without `async with`: over cells of a notebook, over event loops, and at the exit."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
from typing import TYPE_CHECKING

import anyio
import pytest
import trio

from tests.fake_engine import FakeEngine
from tests.server.http.helpers import serving
from weaver import AsyncServiceClient
from weaver.errors import ClosedError, ServiceConnectionError, UnsupportedError
from weaver.server.settings import ServerSettings

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CELLS = """
import asyncio, atexit
from weaver import AsyncServiceClient

client = AsyncServiceClient()
loop = asyncio.new_event_loop()
atexit.register(loop.close)  # of the notebook; the client is left before that


async def first():
    await client


async def second():
    made = await client.create_model("{model}")
    print(made.base_model, len(await client.list_training_runs()))


loop.run_until_complete(first())
loop.run_until_complete(second())
print("end")
"""


@pytest.fixture
def address(home: Path) -> Iterator[str]:
    settings = ServerSettings(home=home, port=0, auth=False)
    with serving(FakeEngine(), settings) as server:
        yield server.address


def test_it_is_open_over_the_cells_of_one_loop(address: str) -> None:
    client = AsyncServiceClient(address)
    with asyncio.Runner() as cells:
        with pytest.raises(ClosedError, match=r"not open.*async with.*or `await` it first"):
            cells.run(client.list_training_runs())

        async def opened() -> bool:
            return await client is await client is client

        assert cells.run(opened())
        model = cells.run(_result(client))
        assert cells.run(client.attach(model)).model_id == model
        cells.run(client.close())
        with pytest.raises(ClosedError):
            cells.run(client.attach(model))
        cells.run(opened())  # and again
        assert cells.run(client.attach(model)).model_id == model


async def _result(client: AsyncServiceClient) -> str:
    return (await client.create_model("fake")).model_id


def test_it_is_opened_anew_in_the_next_event_loop(address: str) -> None:
    client = AsyncServiceClient(address)

    async def first() -> str:
        await client
        return await _result(client)

    async def second(run: str) -> str:
        with pytest.raises(UnsupportedError, match=r"another event loop.*`await`.*ServiceClient"):
            client.create_model("fake")
        await client
        return (await client.attach(run)).model_id

    run = asyncio.run(first())
    assert asyncio.run(second(run)) == run


def test_a_loop_that_has_it_open_keeps_it(address: str) -> None:
    client = AsyncServiceClient(address)

    async def open_it() -> None:
        await client

    with asyncio.Runner() as cells:
        cells.run(open_it())
        with pytest.raises(UnsupportedError, match="open in another event loop"):
            _in_a_thread(open_it)


def _in_a_thread(work: object) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor() as pool:
        pool.submit(lambda: asyncio.run(work())).result()  # type: ignore[operator]


def test_what_entering_raises_comes_to_who_awaits(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("weaver.client.http.FIRST_CONTACT_S", 0.1)

    async def fails() -> None:
        with pytest.raises(ServiceConnectionError):
            await AsyncServiceClient("http://127.0.0.1:9")
        client = AsyncServiceClient("http://127.0.0.1:9")
        with anyio.move_on_after(0.01) as scope:
            await client
        assert scope.cancelled_caught

    asyncio.run(fails())
    gc.collect()
    assert not [record for record in caplog.records if record.name == "asyncio"]


def test_trio_says_to_use_a_block(address: str) -> None:
    async def wait() -> None:
        await AsyncServiceClient(address)

    with pytest.raises(UnsupportedError, match=r"only asyncio.*async with"):
        trio.run(wait)


def test_the_interpreter_ends_without_a_word(
    address: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEAVER_BASE_URL", address)
    _ends_quietly(CELLS.format(model="fake"), "fake 1\nend\n")


@pytest.mark.slow
def test_so_it_does_with_an_engine_in_it(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WEAVER_BASE_URL", raising=False)
    monkeypatch.setenv("WEAVER_HOME", str(home))
    _ends_quietly(CELLS.format(model="weaver-nano"), "weaver-nano 1\nend\n")


def _ends_quietly(program: str, printed: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=120
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, printed, "")


NOTEBOOK = [
    "from weaver import AsyncServiceClient, ServiceClient\nimport weaver_rl as rl\n"
    "service = await AsyncServiceClient()\nsync = ServiceClient()",
    "model = await service.create_model('weaver-nano')\nhandle = model.save_state('one')\nhandle",
    "await handle\nhandle",
    "with sync: print(len(sync.list_supported_models()))",
    "show = rl.Display(steps=40)\nfor step in range(1, 41):\n"
    "    show.log({'reward/mean': step / 40}, step)\nshow.close()",
]


@pytest.mark.slow
def test_a_notebook_keeps_it_and_draws_in_place(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.delenv("WEAVER_BASE_URL", raising=False)
    monkeypatch.setenv("WEAVER_HOME", str(home))
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in NOTEBOOK])
    nbclient.NotebookClient(book, timeout=120, kernel_name="python3").execute()
    outputs = [cell.outputs for cell in book.cells]
    assert "save_checkpoint" in outputs[1][-1].data["text/html"]
    assert "<b>done</b>" in outputs[2][-1].data["text/html"]
    assert outputs[3][-1].text == "1\n"
    [picture] = outputs[4]  # one, not a line for each step
    assert "step 40/40" in picture.data["text/html"]
