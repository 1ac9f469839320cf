"""`weaver sample` and `weaver chat`: a model at the prompt of a shell."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from weaver.cli.output import ask_model

if TYPE_CHECKING:
    from weaver.client.sampling import AsyncSamplingClient

Model = Annotated[str, typer.Option("--model", "-m", help="A base model, or a weaver:// path.")]
MaxTokens = Annotated[int, typer.Option(help="Per answer.")]
Temperature = Annotated[float, typer.Option(help="0 always takes the likeliest token.")]


def sample(
    prompt: Annotated[str, typer.Argument(help="Text to go on from; `-` reads stdin.")],
    model: Model = "weaver-nano",
    max_tokens: MaxTokens = 100,
    temperature: Temperature = 1.0,
    num_samples: Annotated[int, typer.Option("--num-samples", "-n")] = 1,
    stop: Annotated[list[str] | None, typer.Option(help="Ends an answer; repeatable.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same samples again.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Sample from a model or a checkpoint."""
    from weaver.types import SamplingParams

    text = sys.stdin.read() if prompt == "-" else prompt
    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, stop=stop or (), seed=seed
    )
    result = ask_model(model, lambda client: client.sample(text, params, num_samples=num_samples))
    if as_json:
        sys.stdout.write(result.model_dump_json(indent=2) + "\n")
        return
    for sequence in result.sequences:
        sys.stdout.write(f"{sequence.text}\n")


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
                sys.stdout.write(delta.text)
                sys.stdout.flush()
            sys.stdout.write("\n")
            messages.append(Message(role="assistant", content="".join(pieces)))

    ask_model(model, talk)


def _read_line() -> str:
    sys.stdout.write("> ")
    sys.stdout.flush()
    return sys.stdin.readline().strip()
