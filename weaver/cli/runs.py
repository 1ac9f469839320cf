"""`weaver runs`: models in training."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from weaver.cli.output import Json, Yes, ask, find, show, show_one

if TYPE_CHECKING:
    from weaver.protocol import Service
    from weaver.types import TrainingRun

app = typer.Typer(help="Models in training.", no_args_is_help=True)
RunId = Annotated[str, typer.Argument(help="The id, or its beginning, with or without `run-`.")]


@app.command("list")
def list_runs(as_json: Json = False) -> None:
    """List the runs that the service has."""
    runs = ask(lambda service: service.list_runs())
    hidden = None if as_json else {"lora_config", "user_metadata"}
    rows = [run.model_dump(mode="json", exclude=hidden) for run in runs]
    show(rows, as_json=as_json, empty="No runs.")


@app.command("show")
def show_run(run_id: RunId, as_json: Json = False) -> None:
    """Show a run and its last metrics."""

    async def read(service: Service) -> dict[str, object]:
        run = await find_run(service, run_id)
        points = await service.read_metrics(run.run_id)
        latest = {point.name: point.value for point in points}
        return {**run.model_dump(mode="json"), "metrics": latest}

    show_one(ask(read), as_json=as_json)


@app.command()
def stop(run_id: RunId) -> None:
    """Cancel what waits for a run and free its memory; its next operation brings it back."""

    async def end(service: Service) -> TrainingRun:
        return await service.stop_run((await find_run(service, run_id)).run_id)

    stopped = ask(end)
    sys.stdout.write(f"Stopped {stopped.run_id} at step {stopped.step}.\n")


@app.command()
def delete(
    run_id: RunId,
    checkpoints: Annotated[
        bool, typer.Option("--checkpoints", help="Delete its checkpoints, too.")
    ] = False,
    yes: Yes = False,
) -> None:
    """Forget a run and its metrics for good. Its checkpoints stay, unless asked otherwise."""
    run = ask(lambda service: find_run(service, run_id))
    too = " and its checkpoints" if checkpoints else ""
    if not yes:
        typer.confirm(f"Delete {run.run_id}{too}?", abort=True)
    ask(lambda service: service.delete_run(run.run_id, checkpoints=checkpoints))
    sys.stdout.write(f"Deleted {run.run_id}{too}.\n")


async def find_run(service: Service, run_id: str) -> TrainingRun:
    """The run with this id, which may be abbreviated."""
    runs = await service.list_runs()
    return find(run_id, runs, name=lambda run: run.run_id, what="runs")
