"""`weaver doctor`: what is installed, and whether it works."""

from __future__ import annotations

import platform
import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGES = ("torch", "transformers", "safetensors", "fastapi", "uvicorn", "sqlalchemy")


def doctor(
    model: Annotated[
        str, typer.Option("--model", "-m", help="To load and sample.")
    ] = "weaver-nano",
) -> None:
    """Look at the installation: packages, device, server, and whether a model answers."""
    import anyio

    failed = False
    for name, state in _installation():
        sys.stdout.write(f"{name:<14} {state}\n")
    began = time.perf_counter()
    from weaver.errors import WeaverError

    try:
        said = anyio.run(_try, model)
    except WeaverError as error:
        said, failed = f"FAILED: {error}", True
    sys.stdout.write(f"{model:<14} {said} ({time.perf_counter() - began:.1f} s)\n")
    raise typer.Exit(1 if failed else 0)


def _installation() -> Iterator[tuple[str, str]]:
    from importlib.metadata import PackageNotFoundError, version

    from weaver.config import load_settings

    settings = load_settings()
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    for package in PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            yield package, "not installed"
    yield "home", str(settings.home)
    yield "service", settings.base_url or f"embedded, {settings.device}, {settings.dtype}"
    yield "api key", "set" if settings.api_key else "not set"


async def _try(model: str) -> str:
    """Samples a few tokens."""
    from weaver import AsyncServiceClient
    from weaver.types import SamplingParams

    async with AsyncServiceClient() as service:
        client = await service.create_sampling_client(base_model=model)
        params = SamplingParams(max_tokens=4, temperature=0)
        result = await client.sample(prompt="a", sampling_params=params)
    return f"answers: {result.sequences[0].text!r}"
