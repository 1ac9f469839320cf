"""`weaver checkpoints`: what runs have saved, what comes from elsewhere, and what goes there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from weaver.cli import completion
from weaver.cli.output import (
    Format,
    Output,
    Wide,
    Yes,
    ask,
    confirm,
    find,
    seconds_of,
    show,
    show_one,
)
from weaver.errors import InvalidParamsError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Sequence

    from weaver.protocol import Service
    from weaver.types import CheckpointInfo

app = typer.Typer(help="Saved states and samplers.", no_args_is_help=True)
PATH = "weaver://..., or a part of it that only one has."
Path = Annotated[str, typer.Argument(help=PATH, autocompletion=completion.checkpoints)]
COLUMNS = ("path", "step", "size_bytes", "created_at", "expires_at", "base_model", "kind")


@app.command("list")
def list_checkpoints(
    run: Annotated[
        str | None,
        typer.Option(
            help="Only those of this run; its name, its id, or its beginning.",
            autocompletion=completion.runs,
        ),
    ] = None,
    output: Output = Format.table,
    wide: Wide = False,
) -> None:
    """List checkpoints, oldest first."""

    async def read(service: Service) -> Sequence[CheckpointInfo]:
        known = await service.list_checkpoints()
        owner = None if run is None else await find_owner(service, run)
        return [c for c in known if owner in (None, c.run_id)]

    show(ask(read), output, columns=COLUMNS, wide=wide, empty="No checkpoints.")


@app.command("show")
def show_checkpoint(path: Path, output: Output = Format.table) -> None:
    """Show a checkpoint."""
    show_one(ask(lambda service: find_checkpoint(service, path)), output)


@app.command()
def export(
    path: Path,
    to: Annotated[str, typer.Option(help="A folder, which this command makes.")],
    merge: Annotated[
        bool, typer.Option("--merge", help="A whole model of the base and the adapter.")
    ] = False,
) -> None:
    """Write a checkpoint as PEFT reads it, or as a whole model for transformers."""
    from weaver.client.exports import export_to

    async def write(service: Service) -> str:
        checkpoint = await find_checkpoint(service, path)
        folder = await export_to(service, checkpoint.path, to, merge=merge)
        return f"Wrote {checkpoint.path} to {folder}."

    print(ask(write))


@app.command("import")
def import_checkpoint(
    folder: Annotated[str, typer.Argument(help="Of an adapter as PEFT saves it, or of a model.")],
    base_model: Annotated[
        str | None, typer.Option(help="What it was trained on; an adapter may name it itself.")
    ] = None,
    name: Annotated[str, typer.Option(help="Of the checkpoint.")] = "imported",
) -> None:
    """Make a checkpoint of weights from elsewhere, for a run to begin with."""
    from weaver.client.imports import import_from

    def send(service: Service) -> Awaitable[CheckpointInfo]:
        return import_from(service, folder, base_model=base_model, name=name, ttl_seconds=None)

    print(ask(send).path)


@app.command("delete")
def delete_checkpoints(
    path: Annotated[
        str | None, typer.Argument(help=PATH, autocompletion=completion.checkpoints)
    ] = None,
    run: Annotated[
        str | None, typer.Option(help="Those of this run.", autocompletion=completion.runs)
    ] = None,
    pattern: Annotated[
        str | None, typer.Option(help="Those whose names fit, as `step-*`; or whole paths.")
    ] = None,
    older_than: Annotated[
        str | None, typer.Option(help="Those older than so long: 90m, 12h, 7d.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show which.")] = False,
    yes: Yes = False,
) -> None:
    """Delete a checkpoint for good, or all for which every given option holds."""
    options = (run, pattern, older_than)
    if (path is None) == (options == (None, None, None)):
        raise InvalidParamsError(
            "needs a path, or any of --run, --pattern and --older-than.", field="delete"
        )
    if path is None:
        _delete_many(run, pattern, older_than, dry_run=dry_run, yes=yes)
        return
    checkpoint = ask(lambda service: find_checkpoint(service, path))
    if dry_run:
        print(f"Would delete {checkpoint.path}.")
        return
    confirm(f"Delete {checkpoint.path}?", yes)
    ask(lambda service: service.delete_checkpoint(checkpoint.path))
    print(f"Deleted {checkpoint.path}.")


def _delete_many(
    run: str | None, pattern: str | None, older_than: str | None, *, dry_run: bool, yes: bool
) -> None:
    from weaver.exchange import Selection

    age_s = None if older_than is None else seconds_of(older_than, field="older-than")

    async def choose(service: Service) -> tuple[Selection, Sequence[CheckpointInfo]]:
        owner = None if run is None else await find_owner(service, run)
        which = Selection(run_id=owner, pattern=pattern, older_than_s=age_s)
        return which, await service.delete_checkpoints(which, dry_run=True)

    which, chosen = ask(choose)
    show(chosen, columns=COLUMNS, empty="No checkpoints.")
    if dry_run or not chosen:
        print(f"Would delete {_count(chosen)}.")
        return
    confirm(f"Delete {_count(chosen)}?", yes)
    print(f"Deleted {_count(ask(lambda service: service.delete_checkpoints(which)))}.")


def _count(checkpoints: Sequence[CheckpointInfo]) -> str:
    size_bytes = sum(one.size_bytes for one in checkpoints)
    return f"{len(checkpoints)} checkpoints of {size_bytes:,} bytes"


@app.command()
def ttl(
    path: Path, seconds: Annotated[str, typer.Argument(help="From now; `none` keeps it for good.")]
) -> None:
    """Let a checkpoint expire."""
    if seconds != "none" and not (seconds.isdecimal() and int(seconds) > 0):
        raise InvalidParamsError(f"is {seconds!r}.", field="seconds", hint="A number, or `none`.")
    value = None if seconds == "none" else int(seconds)

    async def change(service: Service) -> CheckpointInfo:
        checkpoint = await find_checkpoint(service, path)
        return await service.set_checkpoint_ttl(checkpoint.path, value)

    changed = ask(change)
    print(f"{changed.path} expires: {changed.expires_at or 'never'}.")


async def find_checkpoint(service: Service, given: str) -> CheckpointInfo:
    """By its path, or by a part of it."""
    if given.startswith("weaver://"):
        return await service.get_checkpoint(given)
    known = await service.list_checkpoints()
    return find(given, known, name=lambda c: c.path, what="checkpoints", within=True)


async def find_owner(service: Service, given: str) -> str:
    """The id of a run, by its name too, of one that is gone or of an import; may be abbreviated."""
    names = {run.run_id: run.name for run in await service.list_runs()}
    owners = names.keys() | {one.run_id for one in await service.list_checkpoints()}
    return find(given, sorted(owners), name=str, alias=names.get, what="runs")
