"""Adapters from elsewhere as checkpoints: pieces, limits, owners, and what is left of them."""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from typing import TYPE_CHECKING

import numpy as np
import pytest
from safetensors.numpy import save

from tests.contracts.caller import Caller
from tests.fake_engine import FakeEngine
from tests.fake_engine.model import VOCAB
from tests.server.http.helpers import running
from weaver.client.imports import import_from
from weaver.errors import (
    CheckpointCorruptError,
    CheckpointNotFoundError,
    ConflictError,
    InvalidNameError,
    NameTakenError,
    NotFoundError,
    QuotaExceededError,
    StorageError,
    TooLargeError,
    UnknownModelError,
    WeaverError,
)
from weaver.exchange import ExportedFile, Import
from weaver.protocol import CheckpointLoaded, CreateModel, LoadCheckpoint, ModelCreated
from weaver.server import imports
from weaver.server.service import LocalService
from weaver.server.settings import Limits

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from weaver.protocol import Service
    from weaver.types import CheckpointInfo

pytestmark = pytest.mark.anyio
ROW = np.linspace(-1, 1, 2 * VOCAB, dtype=np.float32).reshape(2, VOCAB)
CONFIG = {"r": 8, "base_model_name_or_path": "fake"}


def adapter(**changes: object) -> dict[str, bytes]:
    return {
        "adapter_config.json": json.dumps(CONFIG | changes).encode(),
        "adapter_model.safetensors": save({"weight": ROW}),
    }


def written(folder: Path, files: Mapping[str, bytes]) -> Path:
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def described(files: Mapping[str, bytes], **more: object) -> Import:
    sums = [
        ExportedFile(name=name, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        for name, data in files.items()
    ]
    return Import.model_validate({"files": sums, **more})


async def send(service: Service, files: Mapping[str, bytes], *, piece: int = 1000) -> str:
    import_id = uuid.uuid4().hex
    for name, data in files.items():
        for offset in range(0, len(data), piece):
            part = data[offset : offset + piece]
            await service.put_import(import_id, name, part, offset=offset)
    return import_id


async def take(service: Service, folder: Path, **options: str | int | None) -> CheckpointInfo:
    settings: dict[str, object] = {"base_model": None, "name": "mine", "ttl_seconds": None}
    return await import_from(service, folder, **{**settings, **options})  # type: ignore[arg-type]


def left(home: Path) -> list[Path]:
    return [*home.glob("imports/*"), *home.glob("runs/*/*/.draft-*")]


async def test_a_run_begins_with_what_was_imported(home: Path, tmp_path: Path) -> None:
    async with running(home) as server, server.client() as service:
        saved = await take(service, written(tmp_path / "adapter", adapter()))
        assert saved.path == f"weaver://{saved.run_id}/weights/mine"
        assert (saved.kind, saved.step, saved.folder) == ("weights", 0, None)
        assert saved.lora_config is not None and saved.lora_config.rank == 8
        assert [c.path for c in await service.list_checkpoints()] == [saved.path]
        caller = await Caller.open(service)
        create = CreateModel(base_model=saved.base_model, lora_config=saved.lora_config)
        run = (await caller.do(create, ModelCreated)).run.run_id
        await caller.do(LoadCheckpoint(path=saved.path), CheckpointLoaded, run_id=run)
        again = await caller.save(run)
        data = await service.read_exported(again, "weight.npy")
        assert ROW.tobytes() in data
    assert left(home) == []


async def test_pieces_come_again_and_in_order(home: Path) -> None:
    files = adapter()
    async with LocalService(FakeEngine(), home=home) as service:
        import_id = await send(service, files)
        name, data = "adapter_model.safetensors", files["adapter_model.safetensors"]
        await service.put_import(import_id, name, data[500:700], offset=500)  # as it was
        with pytest.raises(ConflictError, match=r"has \d+ bytes so far"):
            await service.put_import(import_id, name, b"x", offset=len(data) + 1)
        first = await service.import_checkpoint(import_id, described(files))
        assert await service.import_checkpoint(import_id, described(files)) == first
        assert left(home) == []
        near = import_id[:12] + uuid.uuid4().hex[12:]
        await service.put_import(near, "adapter_config.json", b"{}", offset=0)
        with pytest.raises(NameTakenError):
            await service.import_checkpoint(near, described(files))


@pytest.mark.parametrize("name", ["../x.json", "x.bin", "a/b.json", ".json", "", "x" * 200])
async def test_no_other_files_are_taken(home: Path, name: str) -> None:
    async with LocalService(FakeEngine(), home=home) as service:
        with pytest.raises(InvalidNameError):
            await service.put_import(uuid.uuid4().hex, name, b"x", offset=0)
        with pytest.raises(InvalidNameError, match="32 hexadecimal"):
            await service.put_import("../" + "a" * 29, "x.json", b"x", offset=0)
        assert left(home) == []


async def test_what_did_not_come_as_it_was_sent_is_refused(home: Path) -> None:
    files = adapter()
    changed = files | {"adapter_model.safetensors": b"x" + files["adapter_model.safetensors"][1:]}
    async with LocalService(FakeEngine(), home=home) as service:
        import_id = await send(service, changed)
        for wrong in (files, files | {"other.json": b"{}"}):
            with pytest.raises(CheckpointCorruptError, match="has not come as it was sent"):
                await service.import_checkpoint(import_id, described(wrong))
        assert await service.list_checkpoints() == []
        await service.drop_import(import_id)
        with pytest.raises(NotFoundError, match="Begin again"):
            await service.import_checkpoint(import_id, described(files))
        assert left(home) == []


async def test_bad_weights_leave_nothing(home: Path, tmp_path: Path) -> None:
    folder = written(tmp_path / "adapter", adapter(base_model_name_or_path="elsewhere"))
    async with running(home) as server, server.client() as service:
        with pytest.raises(UnknownModelError):
            await take(service, folder)
        with pytest.raises(UnknownModelError):
            await take(service, folder, base_model="other")
        with pytest.raises(InvalidNameError):
            await take(service, folder, base_model="fake", name="../x")
        assert (await take(service, folder, base_model="fake")).base_model == "fake"
    assert left(home) == []


async def test_limits_of_imports(home: Path) -> None:
    files, kept = adapter(), dict[str, bytes]()
    limits = Limits(import_bytes=5000, imports=2, stored_bytes=4000)
    async with LocalService(FakeEngine(), home=home, limits=limits) as service:
        with pytest.raises(TooLargeError, match="the limit is 5000"):
            await send(service, kept | {"a.json": bytes(3000), "b.json": bytes(3000)})
        first = await send(service, files)
        with pytest.raises(QuotaExceededError, match="begun 2 imports"):
            await send(service, files)
        await service.import_checkpoint(first, described(files))
        second = await send(service, files)
        with pytest.raises(QuotaExceededError, match="bytes, the limit is 4000"):
            await service.import_checkpoint(second, described(files))


async def test_imports_are_their_projects_also_after_a_restart(home: Path, tmp_path: Path) -> None:
    files = adapter()
    async with running(home, auth=True) as server:
        secrets = {name: server.keys.create(name)[1] for name in ("alice", "bob")}
        async with server.client(secrets["alice"]) as alice, server.client(secrets["bob"]) as bob:
            import_id = await send(alice, files)
            with pytest.raises(NotFoundError):
                await bob.put_import(import_id, "adapter_config.json", b"{}", offset=0)
            with pytest.raises(NotFoundError):
                await bob.import_checkpoint(import_id, described(files))
            await bob.drop_import(import_id)  # says nothing, does nothing
            path = (await alice.import_checkpoint(import_id, described(files))).path
            with pytest.raises(NotFoundError):
                await bob.import_checkpoint(import_id, described(files))
    async with running(home, auth=True) as server:
        async with server.client(secrets["alice"]) as alice, server.client(secrets["bob"]) as bob:
            assert (await alice.get_checkpoint(path)).path == path
            with pytest.raises(CheckpointNotFoundError):
                await bob.get_checkpoint(path)


async def test_an_owner_that_could_not_be_written_down_is_none(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = adapter()
    async with running(home, auth=True) as server:
        secret = server.keys.create("alice")[1]
        store = server.service.parts.store
        async with server.client(secret) as alice:
            import_id = await send(alice, files)
            with monkeypatch.context() as patch:
                patch.setattr(store, "put_owner", full_disk)
                with pytest.raises(StorageError):
                    await alice.import_checkpoint(import_id, described(files))
            assert await alice.list_checkpoints() == []
            path = (await alice.import_checkpoint(import_id, described(files))).path
    async with running(home, auth=True) as server, server.client(secret) as alice:
        assert [info.path for info in await alice.list_checkpoints()] == [path]


async def full_disk(run_id: str, project: str) -> None:
    raise StorageError("the disk is full.", hint="Free some space.")


async def test_what_silent_clients_sent_goes(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with LocalService(FakeEngine(), home=home) as service:
        import_id = await send(service, adapter())
        service.parts.imports.sweep()
        assert len(left(home)) == 1
        monkeypatch.setattr(imports, "SILENT_S", -1.0)
        service.parts.imports.sweep()
        assert left(home) == []
        with pytest.raises(NotFoundError):
            await service.import_checkpoint(import_id, described(adapter()))
    (home / "imports/.draft-of-a-killed-one").mkdir(parents=True)
    async with LocalService(FakeEngine(), home=home) as service:
        deadline = time.monotonic() + 5
        service.parts.imports.sweep()
        assert left(home) == [] and time.monotonic() < deadline


BROKEN: list[tuple[str, Mapping[str, bytes], str]] = [
    ("nothing", {}, "has no config.json"),
    ("a pickle", {"adapter_config.json": b"{}", "adapter_model.bin": b""}, "adapter_model.safe"),
    ("no weights", {"config.json": b"{}"}, "has no model.safetensors"),
    ("a lost shard", {"config.json": b"{}", "model.safetensors.index.json": b"{"}, "files beside"),
    (
        "a shard elsewhere",
        {
            "config.json": b"{}",
            "model.safetensors.index.json": b'{"weight_map": {"a": "../../x.safetensors"}}',
        },
        "files beside",
    ),
]


@pytest.mark.parametrize(("what", "files", "said"), BROKEN)
async def test_folders_that_hold_neither(
    home: Path, tmp_path: Path, what: str, files: Mapping[str, bytes], said: str
) -> None:
    async with LocalService(FakeEngine(), home=home) as service:
        with pytest.raises(WeaverError, match=said) as raised:
            await take(service, written(tmp_path / "folder", files))
        assert raised.value.field == "folder" and raised.value.hint
        assert not isinstance(raised.value, StorageError), what
