"""`weaver checkpoints eval`: a checkpoint, or a base model, on tasks of lm-eval and inspect-ai.

Both speak to OpenAI's routes: of the configured server, or of one that this command starts on this
machine for as long as it runs.
"""

from __future__ import annotations

import json
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import fields
from datetime import datetime
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Annotated

import typer

from weaver.cli import completion
from weaver.cli.checkpoints import find_checkpoint
from weaver.cli.output import Format, Output, show
from weaver.config import EngineSettings, Settings, load_settings
from weaver.errors import InvalidParamsError, NameTakenError, requiring

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from weaver.cli.harnesses import Harness, Score
    from weaver.server.serve import Running
    from weaver.types import ModelInfo


def evaluate(
    path: Annotated[
        str,
        typer.Argument(
            help="weaver://..., a part of it, or a base model.",
            autocompletion=completion.checkpoints,
        ),
    ],
    tasks: Annotated[
        list[str],
        typer.Option(
            help="Names and YAML files of lm-eval, Python files of inspect-ai and its names with a "
            "slash; repeatable, or with commas between."
        ),
    ],
    out: Annotated[
        str | None, typer.Option(help="A folder, which this command makes; below evaluations/.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many of a task.")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples before each question, for lm-eval.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Through the chat template; inspect-ai always does.")
    ] = False,
    concurrency: Annotated[int, typer.Option(min=1, max=256, help="Requests at once.")] = 16,
    output: Output = Format.table,
) -> None:
    """Evaluate a checkpoint with lm-eval and inspect-ai, which the extra `eval` installs."""
    import anyio

    from weaver.cli.harnesses import Target, harness_of

    chosen: dict[str, tuple[Harness, list[str]]] = {}
    for task in (one.strip() for item in tasks for one in item.split(",")):
        if not task or task.startswith("-"):
            raise InvalidParamsError(f"has {task!r}.", field="tasks", hint="Name tasks or files.")
        harness = harness_of(task)
        chosen.setdefault(harness.name, (harness, []))[1].append(task)
    for harness, _ in chosen.values():
        harness.check()
    folder = _folder(out)
    scores: list[Score] = []
    with serving(load_settings()) as (address, api_key), tempfile.TemporaryDirectory() as words:
        model, info, files = anyio.run(_find, address, api_key, path)
        for name, content in files.items():
            (Path(words) / name).write_bytes(content)
        target = Target(
            address=address,
            api_key=api_key or "",
            model=model,
            context_length=info.context_length,
            tokenizer=Path(words),
            concurrency=concurrency,
            limit=limit,
            num_fewshot=num_fewshot,
            chat=chat,
        )
        for harness, named in chosen.values():
            scores += harness.run(target, named, folder / harness.name)
    told = {
        "model": model,
        "base_model": info.name,
        "scores": [score.model_dump(mode="json") for score in scores],
    }
    (folder / "scores.json").write_text(json.dumps(told, indent=2))
    show(scores, output)
    print(f"Wrote {folder / 'scores.json'}.", file=sys.stderr)


@contextmanager
def serving(settings: Settings) -> Iterator[tuple[str, str | None]]:
    """The address of the configured server and the key for it, or of one of this process."""
    if settings.base_url:
        yield settings.base_url.rstrip("/"), settings.api_key
        return
    import anyio

    with requiring("the server", "server,engine"):
        from weaver.engine.torch.engine import TorchEngine
        from weaver.server.serve import run_server
        from weaver.server.settings import ServerSettings
    shared = {field.name: getattr(settings, field.name) for field in fields(EngineSettings)}
    served = ServerSettings(**shared, port=0, auth=False)
    started: SimpleQueue[Running | None] = SimpleQueue()
    with closing(TorchEngine.of(served)) as engine, ThreadPoolExecutor(1) as pool:
        run = partial(run_server, engine, served, started=started.put)
        ended = pool.submit(anyio.run, run)
        ended.add_done_callback(lambda _: started.put(None))
        running = started.get()
        if running is None:
            ended.result()
            return
        try:
            yield running.address, None
        finally:
            running.stop()
        ended.result()


async def _find(
    address: str, api_key: str | None, path: str
) -> tuple[str, ModelInfo, Mapping[str, bytes]]:
    """The name on the server, the base model, and the files of its tokenizer."""
    from weaver.client.http import HttpService

    async with HttpService(address, api_key=api_key) as service:
        known = {model.name for model in await service.list_models()}
        if path in known:
            name = base_model = path
        else:
            checkpoint = await find_checkpoint(service, path)
            name, base_model = checkpoint.path, checkpoint.base_model
        info = await service.get_model(base_model)
        return name, info, await service.tokenizer_files(base_model)


def _folder(out: str | None) -> Path:
    """Raises NameTakenError."""
    name = f"evaluations/{datetime.now():%Y-%m-%d-%H%M%S}"
    folder = Path(out or name).expanduser().absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise NameTakenError(f"{folder} is there.", field="out", hint="Name another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
