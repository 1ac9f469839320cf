"""`weaver cluster`: what lies beyond one process."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from weaver.config import load_settings

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
