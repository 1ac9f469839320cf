"""Base models of a server: how they are named, and a server that has room for one of two."""

from __future__ import annotations

import re
import shutil
import signal
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from tests.cli.test_config_file import options
from tests.cli.test_serve import serve
from weaver import AsyncServiceClient
from weaver.engine.sources import ModelSource, parse_models
from weaver.engine.torch.catalog import NANO
from weaver.engine.torch.engine import TorchEngine
from weaver.errors import ConfigError, UnknownModelError, WeaverError


def test_each_model_is_served_under_its_name_and_its_source(tmp_path: Path) -> None:
    folder = str(tmp_path)
    given = ["mine=a/b", "c/d,load=start", f"x={folder},context=8192,load=first_use", "e=f=g"]
    assert parse_models(given) == {
        "mine": ModelSource("a/b"),
        "a/b": ModelSource("a/b"),
        "c/d": ModelSource("c/d", load="start"),
        "x": ModelSource(tmp_path, 8192),
        folder: ModelSource(tmp_path, 8192),
        "e=f": ModelSource("g"),
        "g": ModelSource("g"),
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["a=b,contxt=1"], r"unknown option 'contxt'.*'context'"),
        (["a=b,context=many"], "context 'many'.*context=8192"),
        (["a=b,context=0"], "context '0'"),
        (["a=b,context="], "context ''"),
        (["a=b,load=later"], "loaded at 'later'.*first_use or start"),
        (["a="], r"'a='.*\[NAME=\]SOURCE"),
        ([""], r"is ''.*\[NAME=\]SOURCE"),
        (["a=b", "a=c"], "'a' has two sources"),
        (["a=b", "b,context=5"], "'b' has two sources"),
    ],
)
def test_a_model_that_cannot_be_understood_is_named(given: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_models(given)


def test_models_are_tables_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "weaver.toml"
    file.write_text(
        'port = 1\n[[model]]\nname = "org/one"\nsource = "/m/1"\ncontext = 9\nload = "start"\n'
        '[[model]]\nsource = "org/two"\n'
    )
    assert options("--config", str(file))["model"] == [
        "org/one=/m/1,context=9,load=start",
        "org/two",
    ]
    for content, message in (
        ('[[model]]\nname = "a"', "model: has no source"),
        ('[[model]]\nsource = "a"\nlength = 1', "model: has the unknown key 'length'"),
    ):
        file.write_text(content)
        with pytest.raises(ConfigError, match=message):
            options("--config", str(file))


def hub_cache(folder: Path, name: str) -> None:
    """weaver-nano under an id, as the hub's client keeps it."""
    place = folder / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("abc123")
    (place / "blobs").mkdir()
    (place / "snapshots" / "abc123").mkdir(parents=True)
    for number, file in enumerate(sorted(NANO.iterdir())):
        shutil.copyfile(file, place / "blobs" / str(number))
        (place / "snapshots" / "abc123" / file.name).symlink_to(f"../../blobs/{number}")


def test_an_id_is_found_in_the_cache_of_the_hub_or_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub_cache(tmp_path, "acme/tiny")
    models = parse_models(["acme/tiny,context=100"])
    engine = TorchEngine(models, allow_paths=False, threads=1)
    names = {model.name: model for model in engine.prepare()}
    assert names["acme/tiny"].context_length == 100
    engine.trainer.create_run("run", "acme/tiny", training_mode="lora", lora_config=None, seed=0)
    engine.close()
    with pytest.raises(UnknownModelError, match=r"acme/other.*cannot be read or fetched"):
        TorchEngine(parse_models(["acme/other"]), allow_paths=False).prepare()
    for file in tmp_path.rglob("snapshots/abc123/*.safetensors"):
        file.unlink()
    with pytest.raises(WeaverError, match=r"acme/tiny are not whole.*weaver models download"):
        TorchEngine(models, allow_paths=False).prepare()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "a=/not/there"], "UnknownModelError|'a': cannot be read"),
        (["--model", "a={nano}", "--model-memory-gb", "0.001"], "a takes 2.2 MB"),
        (["--model", "a={nano},context=5000"], "context of 5000 tokens, it has 1024"),
    ],
)
def test_what_cannot_be_served_is_named_before_the_server_listens(
    arguments: list[str], said: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    from weaver.cli.serve import serve as command

    values: dict[str, Any] = options(*[part.format(nano=NANO) for part in arguments])
    with pytest.raises(WeaverError, match=said):
        command(**{**values, "home": home, "port": 0})


async def reply(service: AsyncServiceClient, model: str) -> Any:
    client = await service.create_sampling_client(base_model=model)
    result = await client.sample("The", {"max_tokens": 5, "seed": 1})
    return [sequence.tokens for sequence in result.sequences]


def test_a_server_with_room_for_one_of_two_models(home: Path, tmp_path: Path) -> None:
    shutil.copytree(NANO, tmp_path / "mine")
    hub_cache(tmp_path / "hub", "acme/tiny")
    config = tmp_path / "weaver.toml"
    config.write_text(
        f'auth = false\nmodel-memory-gb = 0.003\n[[model]]\nname = "org/mine"\n'
        f'source = "{tmp_path / "mine"}"\nload = "start"\n'
        '[[model]]\nsource = "acme/tiny"\ncontext = 100\n'
    )
    hub = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}

    async def use(address: str) -> None:
        async with AsyncServiceClient(address) as service:
            loaded = {m.name: m.loaded for m in await service.list_supported_models()}
            assert loaded["org/mine"] and not loaded["acme/tiny"] and not loaded["weaver-nano"]
            first = await reply(service, "org/mine")
            assert first == await reply(service, "acme/tiny") == await reply(service, "weaver-nano")
            for name in ("org/mine", "acme/tiny"):
                await service.create_model(name, {"rank": 2})
            found = {m.name: m for m in await service.list_supported_models()}
            tiny = found["acme/tiny"]
            assert tiny.loaded and not found["org/mine"].loaded
            assert tiny.context_length == 100 and tiny.size_bytes > 10**6

    with serve(home, "--config", str(config), **hub) as server:
        anyio.run(use, server.address)
        metrics = httpx.get(f"{server.address}/metrics").text
        counts = dict(re.findall(r"^weaver_engine_(\w+) ([\d.]+)$", metrics, re.MULTILINE))
        assert (counts["base_models"], counts["model_loads_total"]) == ("1.0", "5.0")
        assert counts["model_unloads_total"] == "4.0" and counts["waiting_for_models"] == "0.0"
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
    log = "".join(server.log)
    assert re.search(r"serving org/mine \(.* context of 1,024 tokens, loaded\)", log)
    assert "acme/tiny is loaded: " in log and "org/mine is unloaded; its runs stay" in log
