"""`weaver models`, `doctor`, `sample` and `chat`: which models there are, what can run here, and a
model at the prompt of a shell.
"""

from __future__ import annotations

import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from weaver.cli.output import Json, ask, show, show_one
from weaver.config import Settings, load_settings
from weaver.errors import WeaverError, requiring

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from weaver.client.sampling import AsyncSamplingClient

PACKAGES = ("torch", "transformers", "safetensors", "fastapi", "uvicorn", "sqlalchemy")
app = typer.Typer(help="Base models.", no_args_is_help=True)
Model = Annotated[str, typer.Option("--model", "-m", help="A base model, or a weaver:// path.")]
MaxTokens = Annotated[int, typer.Option(help="Per answer.")]
Temperature = Annotated[float, typer.Option(help="0 always takes the likeliest token.")]
T = TypeVar("T")


@app.command("list")
def list_models(as_json: Json = False) -> None:
    """List the base models that the service names."""
    models = ask(lambda service: service.list_models())
    show(models, as_json=as_json, empty="No models.")


@app.command()
def download(
    name: Annotated[str, typer.Argument(metavar="ID", help="A Hugging Face id: owner/name.")],
) -> None:
    """Fetch a model from the Hugging Face hub to this machine, if it can run here."""
    from weaver.engine.torch.catalog import download

    model, folder = download(name)
    size = f"{model.num_parameters:,} parameters"
    print(f"{model.name} ({model.architecture}, {size}) is in {folder}.")


@app.command()
def check(
    name: Annotated[str, typer.Argument(help="A name, a Hugging Face id or a folder.")],
    as_json: Json = False,
) -> None:
    """Say whether a model can be trained here, without loading its weights."""
    show_one(ask(lambda service: service.get_model(name)), as_json=as_json)


def doctor(
    model: Annotated[
        str, typer.Option("--model", "-m", help="To load and sample.")
    ] = "weaver-nano",
) -> None:
    """Look at the installation: packages, device, server; whether a model fits and answers."""
    from weaver.types import SamplingParams

    params = SamplingParams(max_tokens=4, temperature=0)
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
            [answer] = ask_model(model, lambda client: client.sample("a", params)).sequences
            _say(model, f"answers: {answer.text!r} ({time.perf_counter() - began:.1f} s)")
    except WeaverError as error:
        _say(model, f"FAILED: {error}")
        fits = False
    raise typer.Exit(0 if fits else 1)


def _say(name: str, state: str) -> None:
    print(f"{name:<14} {state}")


def _installation(settings: Settings) -> Iterator[tuple[str, str]]:
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
    with requiring("the embedded engine", "engine"):
        from weaver.engine.torch.catalog import Catalog
        from weaver.engine.torch.engine import free_bytes, needs_of
    needs = needs_of(Catalog({}, allow_paths=True).facts(model), dtype=settings.dtype)
    return needs.against(free_bytes(settings.device))


def sample(
    prompt: Annotated[str, typer.Argument(help="Text to go on from; `-` reads stdin.")],
    model: Model = "weaver-nano",
    max_tokens: MaxTokens = 100,
    temperature: Temperature = 1.0,
    num_samples: Annotated[int, typer.Option("--num-samples", "-n")] = 1,
    stop: Annotated[list[str] | None, typer.Option(help="Ends an answer; repeatable.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same samples again.")] = None,
    as_json: Json = False,
) -> None:
    """Sample from a model or a checkpoint."""
    from weaver.types import SamplingParams

    text = sys.stdin.read() if prompt == "-" else prompt
    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, stop=stop or (), seed=seed
    )
    result = ask_model(model, lambda client: client.sample(text, params, num_samples=num_samples))
    if as_json:
        print(result.model_dump_json(indent=2))
        return
    for sequence in result.sequences:
        print(sequence.text)


def chat(
    model: Model = "weaver-nano", max_tokens: MaxTokens = 256, temperature: Temperature = 0.7
) -> None:
    """Talk with a model; an empty line or Ctrl-D ends it."""
    from anyio.to_thread import run_sync

    from weaver.types import Message, SamplingParams

    params = SamplingParams(max_tokens=max_tokens, temperature=temperature)

    async def talk(client: AsyncSamplingClient) -> None:
        messages: list[Message] = []
        while said := await run_sync(_read_line):
            messages.append(Message(role="user", content=said))
            pieces = []
            async for delta in client.stream(list(messages), params):
                pieces.append(delta.text)
                print(delta.text, end="", flush=True)
            print()
            messages.append(Message(role="assistant", content="".join(pieces)))

    ask_model(model, talk)


def _read_line() -> str:
    print("> ", end="", flush=True)
    return sys.stdin.readline().strip()


def ask_model(model: str, question: Callable[[AsyncSamplingClient], Awaitable[T]]) -> T:
    """Asks a client that samples from a base model or a weaver:// path."""
    import anyio

    from weaver import AsyncServiceClient

    async def run() -> T:
        path, name = (model, None) if model.startswith("weaver://") else (None, model)
        async with AsyncServiceClient() as service:
            return await question(await service.create_sampling_client(path, name))

    return anyio.run(run)
