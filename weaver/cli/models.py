"""`weaver models`, `sample` and `chat`: which models there are, and one at a shell's prompt."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from weaver.cli import completion
from weaver.cli.output import Format, Output, Wide, ask, show, show_one
from weaver.errors import requiring

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from weaver.client.sampling import AsyncSamplingClient

app = typer.Typer(help="Base models.", no_args_is_help=True)
Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="A base model, or a weaver:// path.",
        autocompletion=completion.models,
    ),
]
MaxTokens = Annotated[int, typer.Option(help="Per answer.")]
Temperature = Annotated[float, typer.Option(help="0 always takes the likeliest token.")]
T = TypeVar("T")
COLUMNS = ("name", "num_parameters", "context_length", "size_bytes", "loaded", "architecture")


@app.command("list")
def list_models(output: Output = Format.table, wide: Wide = False) -> None:
    """List the base models that the service names."""
    models = ask(lambda service: service.list_models())
    show(models, output, columns=COLUMNS, wide=wide, empty="No models.")


@app.command()
def download(
    name: Annotated[str, typer.Argument(metavar="ID", help="A Hugging Face id: owner/name.")],
) -> None:
    """Fetch a model from the Hugging Face hub to this machine, if it can run here."""
    with requiring("a download", "engine"):
        from weaver.engine.torch.download import download
    model, folder = download(name)
    size = f"{model.num_parameters:,} parameters"
    print(f"{model.name} ({model.architecture}, {size}) is in {folder}.")


@app.command()
def check(
    name: Annotated[str, typer.Argument(help="A name, a Hugging Face id or a folder.")],
    output: Output = Format.table,
) -> None:
    """Say whether a model can be trained here, without loading its weights."""
    show_one(ask(lambda service: service.get_model(name)), output)


def sample(
    prompt: Annotated[str, typer.Argument(help="Text to go on from; `-` reads stdin.")],
    model: Model = "weaver-nano",
    max_tokens: MaxTokens = 100,
    temperature: Temperature = 1.0,
    num_samples: Annotated[int, typer.Option("--num-samples", "-n")] = 1,
    stop: Annotated[list[str] | None, typer.Option(help="Ends an answer; repeatable.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same samples again.")] = None,
    output: Output = Format.table,
) -> None:
    """Sample from a model or a checkpoint."""
    from weaver.types import SamplingParams

    text = sys.stdin.read() if prompt == "-" else prompt
    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, stop=stop or (), seed=seed
    )
    result = ask_model(model, lambda client: client.sample(text, params, num_samples=num_samples))
    if output is Format.json:
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
