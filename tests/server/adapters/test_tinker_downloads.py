"""Tinker's protocol: checkpoints are downloaded as an archive or file by file, by who may."""

from __future__ import annotations

import io
import tarfile
from typing import TYPE_CHECKING

import pytest

from tests.server.adapters.tinker import Tinker, tinker
from tests.server.http.helpers import running
from weaver.server.http import downloads

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import httpx

pytestmark = pytest.mark.anyio
FILES = {"weight.npy", "state.json"}
"""Those that the fake engine's adapter has for other programs."""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def save(api: Tinker, model_id: str, verb: str, seq_id: int, **given: object) -> str:
    body = {"model_id": model_id, "path": "a", "seq_id": seq_id, **given}
    return str((await api.result(await api.call(verb, body)))["path"])


def stored(home: Path, place: str) -> Mapping[str, bytes]:
    (folder,) = home.glob(f"runs/*/{place}")
    return {name: (folder / name).read_bytes() for name in FILES}


async def fetched(http: httpx.AsyncClient, url: str) -> bytes:
    reply = await http.get(url)
    assert reply.status_code == 200, reply.text
    assert int(reply.headers["Content-Length"]) == len(reply.content)
    return reply.content


def content_of(archive: bytes) -> Mapping[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        members = tar.getmembers()
        assert all(member.isfile() for member in members)
        return {one.name: tar.extractfile(one).read() for one in members}  # type: ignore[union-attr]


async def test_an_archive_holds_the_files_of_any_checkpoint(home: Path) -> None:
    async with tinker(home) as api:
        model_id = await api.model()
        await save(api, model_id, "save_weights", 1)
        await save(api, model_id, "save_weights_for_sampler", 2)
        for segment, group in (("weights", "weights"), ("sampler_weights", "sampler")):
            found = await api.get(f"training_runs/{model_id}/checkpoints/{segment}/a/archive")
            content = content_of(await fetched(api.http, found["url"]))
            assert content.items() >= stored(home, f"{group}/a").items()
            assert "manifest.json" not in content


async def test_external_weights_are_saved_listed_downloaded_and_deleted(home: Path) -> None:
    async with tinker(home) as api:
        model_id = await api.model()
        path = await save(api, model_id, "save_weights_external", 1, ttl_seconds=3600)
        assert path == f"tinker://{model_id}/external_weights/a"
        assert await save(api, model_id, "save_weights", 2) == f"tinker://{model_id}/weights/a"
        of_run = f"training_runs/{model_id}/checkpoints"
        listed = {
            one["checkpoint_id"]: one["checkpoint_type"]
            for one in (await api.get(of_run))["checkpoints"]
        }
        assert listed == {"external_weights/a": "external", "weights/a": "training"}
        run = await api.get(f"training_runs/{model_id}")
        assert run["last_checkpoint"]["checkpoint_id"] == "weights/a"
        assert (await api.call("weights_info", {"tinker_path": path}))["lora_rank"] == 2
        found = await api.get(f"{of_run}/external_weights/a/external_weights_urls")
        content = {name: await fetched(api.http, url) for name, url in found["urls"].items()}
        assert content == stored(home, "weights/external-a")
        await api.call(f"{of_run}/external_weights/a", method="DELETE", status=204)
        for url in found["urls"].values():
            assert (await api.http.get(url)).status_code == 404
        await api.get(f"{of_run}/external_weights/a/external_weights_urls", status=404)
        await api.get(f"{of_run}/external_weights/a/archive", status=404)


async def test_what_would_not_be_encrypted_is_refused(home: Path) -> None:
    async with tinker(home) as api:
        body = {"model_id": await api.model(), "path": "a", "seq_id": 1}
        recipients = {"age_encryption_recipients": ["age1x"]}
        refused = await api.call("save_weights_external", {**body, **recipients}, status=422)
        assert "encrypts nothing" in refused["detail"]
        await api.result(await api.call("save_weights_external", body))


async def test_an_address_opens_one_checkpoint_for_a_while(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(home, auth=True) as server:
        mine, theirs = (server.keys.create(project)[1] for project in ("mine", "theirs"))
        async with server.http(mine) as http, server.http(theirs) as other:
            api = Tinker(http)
            model_id = await api.model()
            await save(api, model_id, "save_weights_external", 1)
            place = f"training_runs/{model_id}/checkpoints/external_weights/a"
            url = (await api.get(f"{place}/archive"))["url"]
            for verb in ("archive", "external_weights_urls"):
                await Tinker(other).get(f"{place}/{verb}", status=404)
            monkeypatch.setattr(downloads, "URL_LIFE_S", -1)
            late = (await api.get(f"{place}/archive"))["url"]
        async with server.http() as stranger:
            assert content_of(await fetched(stranger, url)).keys() == FILES
            base = url.rsplit("/", 1)[0]
            for hidden in ("manifest.json", "optimizer.safetensors", "x"):
                assert (await stranger.get(f"{base}/{hidden}")).status_code == 404, hidden
            for above in ("..%2Fmanifest.json", "%2e%2e/manifest.json"):
                assert (await stranger.get(f"{base}/{above}")).status_code in (401, 404), above
            for forged in (late, url.replace("weights_files/", "weights_files/x")):
                reply = await stranger.get(forged)
                assert (reply.status_code, reply.json()["code"]) == (403, "permission_denied")
            assert (await stranger.get(f"/api/v1/{place}/archive")).status_code == 401
