"""`weaver checkpoints`: what runs have saved."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from weaver.cli.output import Json, Yes, ask, find, show, show_one
from weaver.errors import InvalidParamsError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weaver.protocol import Service
    from weaver.types import CheckpointInfo

app = typer.Typer(help="Saved states and samplers.", no_args_is_help=True)
Path = Annotated[str, typer.Argument(help="weaver://..., or a part of it that only one has.")]
LONG = ("run_id", "name", "training_mode", "lora_config", "ttl_seconds", "folder")


@app.command("list")
def list_checkpoints(
    run: Annotated[
        str | None, typer.Option(help="Only those of this run; its id, or its beginning.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List checkpoints, oldest first."""

    async def read(service: Service) -> Sequence[CheckpointInfo]:
        known = await service.list_checkpoints()
        if run is None:
            return known
        runs = {r.run_id for r in await service.list_runs()} | {c.run_id for c in known}
        chosen = find(run, sorted(runs), name=str, what="runs")
        return [c for c in known if c.run_id == chosen]

    show(ask(read), as_json=as_json, empty="No checkpoints.", hide=LONG)


@app.command("show")
def show_checkpoint(path: Path, as_json: Json = False) -> None:
    """Show a checkpoint."""
    show_one(ask(lambda service: _find(service, path)), as_json=as_json)


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
        checkpoint = await _find(service, path)
        folder = await export_to(service, checkpoint.path, to, merge=merge)
        return f"Wrote {checkpoint.path} to {folder}.\n"

    sys.stdout.write(ask(write))


@app.command()
def delete(path: Path, yes: Yes = False) -> None:
    """Delete a checkpoint for good."""
    checkpoint = ask(lambda service: _find(service, path))
    if not yes:
        typer.confirm(f"Delete {checkpoint.path}?", abort=True)
    ask(lambda service: service.delete_checkpoint(checkpoint.path))
    sys.stdout.write(f"Deleted {checkpoint.path}.\n")


@app.command()
def ttl(
    path: Path,
    seconds: Annotated[str, typer.Argument(help="From now; `none` keeps it for good.")],
) -> None:
    """Let a checkpoint expire."""
    if seconds != "none" and not (seconds.isdecimal() and int(seconds) > 0):
        raise InvalidParamsError(f"is {seconds!r}.", field="seconds", hint="A number, or `none`.")
    value = None if seconds == "none" else int(seconds)

    async def change(service: Service) -> CheckpointInfo:
        checkpoint = await _find(service, path)
        return await service.set_checkpoint_ttl(checkpoint.path, value)

    changed = ask(change)
    sys.stdout.write(f"{changed.path} expires: {changed.expires_at or 'never'}.\n")


async def _find(service: Service, given: str) -> CheckpointInfo:
    """By its path, or by a part of it."""
    if given.startswith("weaver://"):
        return await service.get_checkpoint(given)
    known = await service.list_checkpoints()
    return find(given, known, name=lambda c: c.path, what="checkpoints", within=True)
