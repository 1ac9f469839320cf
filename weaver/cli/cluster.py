"""`weaver cluster`: what lies beyond one process."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from weaver.cli.output import Format, Output, show_one
from weaver.config import load_settings

if TYPE_CHECKING:
    from weaver.engine.status import GroupStatus, PoolStatus, SamplerStatus

app = typer.Typer(help="Samplers and trainers beyond one process.", no_args_is_help=True)


@app.command("install-sampler")
def install_sampler(
    folder: Annotated[
        Path | None, typer.Option(help="Where, if not sampler-env in the home.")
    ] = None,
    cuda: Annotated[
        bool | None,
        typer.Option(help="The build for CUDA or that for CPUs; by whether there is a driver."),
    ] = None,
) -> None:
    """Make the environment in which vLLM samples; one that is right is left alone."""
    from weaver.engine.cluster.sampler_env import (
        ON_CPU,
        ON_CUDA,
        environment_of,
        install,
        wanted_here,
    )

    wanted = wanted_here() if cuda is None else ON_CUDA if cuda else ON_CPU
    where = folder.expanduser() if folder else environment_of(load_settings())
    install(where, wanted, say=lambda text: print(text, file=sys.stderr))
    print(where)


@app.command()
def status(
    folder: Annotated[
        Path | None,
        typer.Option(help="The `shared` folder of cluster.toml, if not `cluster` in the home."),
    ] = None,
    output: Output = Format.table,
) -> None:
    """Show the groups of a server, their ranks, its samplers, and what waits for what."""
    from weaver.engine.cluster.status import read_status

    found = read_status(folder.expanduser() if folder else load_settings().home / "cluster")
    if output is not Format.table:
        show_one(found, output)
        return
    age_s = max(0.0, time.time() - found.at)
    print(f"{found.ray}; server {found.pid} on {found.host}, as it was {age_s:.0f} s ago")
    for group in found.groups:
        _show(group)
    for pool in found.pools:
        _show_pool(pool)
    for sampler in found.samplers:
        _show_sampler(sampler)


def _show(group: GroupStatus) -> None:
    since_s = max(0.0, time.time() - group.since)
    print(
        f"{group.name:<24} {group.mode}, {group.ranks_wanted} ranks: {group.state} for "
        f"{since_s:.0f} s, {group.runs} runs, started {group.starts} times"
    )
    if group.waits_for:
        print(f"  waits for {group.waits_for}")
    if group.last_loss:
        print(f"  last lost: {group.last_loss}")
    for number, rank in enumerate(group.ranks):
        memory = f"{rank.memory_bytes / 1e9:.2f} GB"
        print(f"  rank {number:<3} {rank.host} process {rank.pid} on {rank.device}, {memory}")


def _show_pool(pool: PoolStatus) -> None:
    print(
        f"samplers of {pool.model}: {pool.workers} run, {pool.free_rows} of {pool.rows} rows are "
        f"free, {pool.waiting} jobs wait"
    )


def _show_sampler(sampler: SamplerStatus) -> None:
    since_s = max(0.0, time.time() - sampler.since)
    where = f", process {sampler.pid} on {sampler.host}" if sampler.pid else ""
    draws = f", {sampler.rows} rows, {sampler.memory_bytes / 1e9:.2f} GB" if sampler.pid else ""
    print(
        f"{sampler.name:<24} {sampler.state} for {since_s:.0f} s, started {sampler.starts} times"
        f"{where}{draws}"
    )
    if sampler.waits_for:
        print(f"  waits for {sampler.waits_for}")
    if sampler.last_loss:
        print(f"  last lost: {sampler.last_loss}")
