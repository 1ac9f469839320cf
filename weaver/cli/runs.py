"""`weaver runs` and `weaver sessions`: what a service has of its clients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from weaver.cli.output import Json, Yes, ask, confirm, find, show, show_one

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weaver.protocol import Service
    from weaver.types import MetricPoint, TrainingRun

runs = typer.Typer(help="Models in training.", no_args_is_help=True)
RunId = Annotated[str, typer.Argument(help="The id, or its beginning, with or without `run-`.")]


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
