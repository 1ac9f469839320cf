"""`weaver runs` and `weaver sessions`: what a service has of its clients."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import typer

from weaver.cli import completion
from weaver.cli.output import Format, Output, Wide, Yes, ask, confirm, find, show, show_one

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weaver.protocol import Service
    from weaver.types import MetricPoint, TrainingRun

runs = typer.Typer(help="Models in training.", no_args_is_help=True)
RUN = (
    "run_id",
    "name",
    "status",
    "step",
    "base_model",
    "last_request_at",
    "training_mode",
    "project",
)
SESSION = ("session_id", "project", "pending", "unnamed_samplers")
RunId = Annotated[
    str,
    typer.Argument(
        help="The name or id, or its beginning, without `run-` too.",
        autocompletion=completion.runs,
    ),
]


def sessions(output: Output = Format.table, wide: Wide = False) -> None:
    """List the open sessions of clients, and how much each waits for."""
    found = ask(lambda service: service.list_sessions())
    show(found, output, columns=SESSION, wide=wide, empty="No sessions.")


# --- runs ---------------------------------------------------------------------------------------


@runs.command("list")
def list_runs(output: Output = Format.table, wide: Wide = False) -> None:
    """List the runs that the service has."""
    found = ask(lambda service: service.list_runs())
    show(found, output, columns=RUN, wide=wide, empty="No runs.")


@runs.command("show")
def show_run(run_id: RunId, output: Output = Format.table) -> None:
    """Show a run and its last metrics."""

    async def read(service: Service) -> tuple[TrainingRun, Sequence[MetricPoint]]:
        run = await find_run(service, run_id)
        return run, await service.read_metrics(run.run_id)

    run, points = ask(read)
    show_one(run, output, metrics={point.name: point.value for point in points})


@runs.command()
def watch(
    run_id: RunId,
    metric: Annotated[
        list[str] | None, typer.Option("--metric", "-m", help="To draw; repeatable.")
    ] = None,
    every: Annotated[float, typer.Option(min=0.2, help="Seconds between two looks.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Draw once, and end.")] = False,
) -> None:
    """Draw a run's curves in the terminal, as they grow, until Ctrl-C."""
    import anyio
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console()

    async def look(service: Service) -> None:
        run = await find_run(service, run_id)
        with Live(console=console, auto_refresh=False) as live:
            while True:
                run = await service.get_run(run.run_id)
                points = await service.read_metrics(run.run_id)
                live.update(Text("\n".join(_curves(run, points, metric, console.width))))
                live.refresh()
                if once or not console.is_terminal:
                    return
                await anyio.sleep(every)

    ask(look)


@runs.command()
def tail(
    run_id: RunId,
    count: Annotated[int, typer.Option("--lines", "-n", min=0, help="Steps to begin with.")] = 10,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until Ctrl-C.")] = False,
    metric: Annotated[
        list[str] | None, typer.Option("--metric", "-m", help="To print; repeatable.")
    ] = None,
) -> None:
    """Print a run's last steps, a line each with its metrics."""
    import anyio

    from weaver.curves import number_text

    async def look(service: Service) -> None:
        run = await find_run(service, run_id)
        printed: int | None = None
        before: dict[str, float] | None = None
        while True:
            steps = _by_step(await service.read_metrics(run.run_id), metric)
            # While followed, a step is whole when a later one has begun, or nothing more came.
            last = max(steps, default=None)
            whole = [s for s in steps if not follow or s != last or steps[s] == before]
            before = steps.get(last) if last is not None else None
            new = [step for step in whole if printed is None or step > printed]
            for step in new[max(0, len(new) - count) :] if printed is None else new:
                values = (f"{name}={number_text(value)}" for name, value in steps[step].items())
                print(step, *values, flush=True)
            printed = max(whole, default=printed)
            if not follow:
                return
            await anyio.sleep(1.0)

    ask(look)


def _by_step(
    points: Sequence[MetricPoint], wanted: Sequence[str] | None
) -> dict[int, dict[str, float]]:
    """The metrics of each step, in order; those without a step are left out."""
    found: dict[int, dict[str, float]] = {}
    for point in points:
        if point.step is not None and (not wanted or point.name in wanted):
            found.setdefault(point.step, {})[point.name] = point.value
    return dict(sorted(found.items()))


def _curves(
    run: TrainingRun, points: Sequence[MetricPoint], wanted: Sequence[str] | None, width: int
) -> list[str]:
    """A header, and a curve for each metric: those asked for, or those that tell of learning."""
    from weaver.curves import TELLING, draw_curve, number_text

    by_name: dict[str, list[float]] = {}
    for point in points:
        by_name.setdefault(point.name, []).append(point.value)
    names = wanted or [name for name in TELLING if name in by_name] or list(by_name)[:2]
    lines = [f"{called(run)}  {run.base_model}  {run.status}, step {run.step}"]
    for name in names:
        values = [value for value in by_name.get(name, []) if math.isfinite(value)]
        lines += ["", f"{name}: {number_text(values[-1])}" if values else f"{name}: nothing yet"]
        if len(values) > 1:
            lines += draw_curve(values, width=min(max(width - 12, 8), 100), height=6)
    return lines if by_name or wanted else [*lines, "", "No metrics yet."]


@runs.command()
def rename(run_id: RunId, name: Annotated[str, typer.Argument(help="The new one.")]) -> None:
    """Give a run another name; one that another run has gets a number."""
    from weaver.names import check_run_name

    check_run_name(name)

    async def change(service: Service) -> tuple[TrainingRun, TrainingRun]:
        run = await find_run(service, run_id)
        return run, await service.rename_run(run.run_id, name)

    before, now = ask(change)
    print(f"{called(before)} is called {now.name} now.")


@runs.command()
def stop(run_id: RunId) -> None:
    """Cancel what waits for a run and free its memory; its next operation brings it back."""

    async def end(service: Service) -> TrainingRun:
        return await service.stop_run((await find_run(service, run_id)).run_id)

    stopped = ask(end)
    print(f"Stopped {called(stopped)} at step {stopped.step}.")


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
    what = f"{called(run)}{' and its checkpoints' if checkpoints else ''}"
    confirm(f"Delete {what}?", yes)
    ask(lambda service: service.delete_run(run.run_id, checkpoints=checkpoints))
    print(f"Deleted {what}.")


async def find_run(service: Service, run_id: str) -> TrainingRun:
    """The run with this id or name, which may be abbreviated."""
    known = await service.list_runs()
    return find(run_id, known, name=lambda run: run.run_id, alias=lambda run: run.name, what="runs")


def called(run: TrainingRun) -> str:
    """By its name, if it has one, and its id."""
    return f"{run.name} ({run.run_id})" if run.name else run.run_id
