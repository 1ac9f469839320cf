"""`weaver runs`, `weaver checkpoints` and `weaver sessions`: what a service has of its clients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from weaver.cli.output import Json, Yes, ask, confirm, find, show, show_one
from weaver.errors import InvalidParamsError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weaver.protocol import Service
    from weaver.types import CheckpointInfo, MetricPoint, TrainingRun

runs = typer.Typer(help="Models in training.", no_args_is_help=True)
checkpoints = typer.Typer(help="Saved states and samplers.", no_args_is_help=True)
RunId = Annotated[str, typer.Argument(help="The id, or its beginning, with or without `run-`.")]
Path = Annotated[str, typer.Argument(help="weaver://..., or a part of it that only one has.")]
LONG = ("run_id", "name", "training_mode", "lora_config", "ttl_seconds", "folder")


def sessions(as_json: Json = False) -> None:
    """List the open sessions of clients, and how much each waits for."""
    found = ask(lambda service: service.list_sessions())
    show(found, as_json=as_json, empty="No sessions.", hide=("user_metadata",))


# --- runs ---------------------------------------------------------------------------------------


@runs.command("list")
def list_runs(as_json: Json = False) -> None:
    """List the runs that the service has."""
    found = ask(lambda service: service.list_runs())
    show(found, as_json=as_json, empty="No runs.", hide=("lora_config", "user_metadata"))


@runs.command("show")
def show_run(run_id: RunId, as_json: Json = False) -> None:
    """Show a run and its last metrics."""

    async def read(service: Service) -> tuple[TrainingRun, Sequence[MetricPoint]]:
        run = await find_run(service, run_id)
        return run, await service.read_metrics(run.run_id)

    run, points = ask(read)
    show_one(run, as_json=as_json, metrics={point.name: point.value for point in points})


@runs.command()
def stop(run_id: RunId) -> None:
    """Cancel what waits for a run and free its memory; its next operation brings it back."""

    async def end(service: Service) -> TrainingRun:
        return await service.stop_run((await find_run(service, run_id)).run_id)

    stopped = ask(end)
    print(f"Stopped {stopped.run_id} at step {stopped.step}.")


@runs.command("delete")
def delete_run(
    run_id: RunId,
    checkpoints: Annotated[
        bool, typer.Option("--checkpoints", help="Delete its checkpoints, too.")
    ] = False,
    yes: Yes = False,
) -> None:
    """Forget a run and its metrics for good. Its checkpoints stay, unless asked otherwise."""
    run = ask(lambda service: find_run(service, run_id))
    what = f"{run.run_id}{' and its checkpoints' if checkpoints else ''}"
    confirm(f"Delete {what}?", yes)
    ask(lambda service: service.delete_run(run.run_id, checkpoints=checkpoints))
    print(f"Deleted {what}.")


async def find_run(service: Service, run_id: str) -> TrainingRun:
    """The run with this id, which may be abbreviated."""
    return find(run_id, await service.list_runs(), name=lambda run: run.run_id, what="runs")


# --- checkpoints --------------------------------------------------------------------------------


@checkpoints.command("list")
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
        owners = {r.run_id for r in await service.list_runs()} | {c.run_id for c in known}
        chosen = find(run, sorted(owners), name=str, what="runs")
        return [c for c in known if c.run_id == chosen]

    show(ask(read), as_json=as_json, empty="No checkpoints.", hide=LONG)


@checkpoints.command("show")
def show_checkpoint(path: Path, as_json: Json = False) -> None:
    """Show a checkpoint."""
    show_one(ask(lambda service: find_checkpoint(service, path)), as_json=as_json)


@checkpoints.command()
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


@checkpoints.command("delete")
def delete_checkpoint(path: Path, yes: Yes = False) -> None:
    """Delete a checkpoint for good."""
    checkpoint = ask(lambda service: find_checkpoint(service, path))
    confirm(f"Delete {checkpoint.path}?", yes)
    ask(lambda service: service.delete_checkpoint(checkpoint.path))
    print(f"Deleted {checkpoint.path}.")


@checkpoints.command()
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
