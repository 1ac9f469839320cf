"""`weaver doctor`: what is installed, and whether it works."""

from __future__ import annotations

import platform
import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from weaver.config import Settings

PACKAGES = ("torch", "transformers", "safetensors", "fastapi", "uvicorn", "sqlalchemy")


def doctor(
    model: Annotated[
        str, typer.Option("--model", "-m", help="To load and sample.")
    ] = "weaver-nano",
) -> None:
    """Look at the installation: packages, device, server; whether a model fits and answers."""
    import anyio

    from weaver.config import load_settings
    from weaver.errors import WeaverError

    settings = load_settings()
    for name, state in _installation(settings):
        _say(name, state)
    began = time.perf_counter()
    fits = True
    try:
        if settings.base_url is None:  # a server has its own memory
            fits, said = _memory(settings, model)
            _say("memory", said)
        if fits:
            _say(model, f"{anyio.run(_try, model)} ({time.perf_counter() - began:.1f} s)")
    except WeaverError as error:
        _say(model, f"FAILED: {error}")
        fits = False
    raise typer.Exit(0 if fits else 1)


def _say(name: str, state: str) -> None:
    sys.stdout.write(f"{name:<14} {state}\n")


def _installation(settings: Settings) -> Iterator[tuple[str, str]]:
    from importlib.metadata import PackageNotFoundError, version

    yield "python", f"{platform.python_version()} on {platform.platform()}"
    for package in PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            yield package, "not installed"
    yield "home", str(settings.home)
    yield "service", settings.base_url or f"embedded, {settings.device}, {settings.dtype}"
    yield "api key", "set" if settings.api_key else "not set"


def _memory(settings: Settings, model: str) -> tuple[bool, str]:
    """Whether it fits, in words; before it is loaded, which might take the machine down."""
    from weaver.errors import requiring

    with requiring("the embedded engine", "engine"):
        from weaver.engine.torch.catalog import Catalog
        from weaver.engine.torch.store import free_bytes, needs_of
    needs = needs_of(Catalog({}, allow_paths=True).facts(model), dtype=settings.dtype)
    return needs.against(free_bytes(settings.device))


async def _try(model: str) -> str:
    """Samples a few tokens."""
    from weaver import AsyncServiceClient
    from weaver.types import SamplingParams

    async with AsyncServiceClient() as service:
        client = await service.create_sampling_client(base_model=model)
        params = SamplingParams(max_tokens=4, temperature=0)
        result = await client.sample(prompt="a", sampling_params=params)
    return f"answers: {result.sequences[0].text!r}"
