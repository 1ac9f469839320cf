"""`weaver runs`: models in training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from weaver.cli.output import Json, ask, find, show, show_one

if TYPE_CHECKING:
    from weaver.protocol import Service
    from weaver.types import TrainingRun

app = typer.Typer(help="Models in training.", no_args_is_help=True)
RunId = Annotated[str, typer.Argument(help="The id, or its beginning, with or without `run-`.")]


@app.command("list")
def list_runs(as_json: Json = False) -> None:
    """List the runs that the service has."""
    runs = ask(lambda service: service.list_runs())
    rows = [
        run.model_dump(mode="json", exclude={"lora_config", "user_metadata"})
        if not as_json
        else run.model_dump(mode="json")
        for run in runs
    ]
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


async def find_run(service: Service, run_id: str) -> TrainingRun:
    """The run with this id, which may be abbreviated."""
    runs = await service.list_runs()
    return find(run_id, runs, name=lambda run: run.run_id, what="runs")
