"""`weaver models`: which base models there are, and whether one can run."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from weaver.cli.output import Json, ask, show, show_one

app = typer.Typer(help="Base models.", no_args_is_help=True)


@app.command("list")
def list_models(as_json: Json = False) -> None:
    """List the base models that the service names."""
    models = ask(lambda service: service.list_models())
    rows = [model.model_dump(mode="json") for model in models]
    show(rows, as_json=as_json, empty="No models.")


@app.command()
def download(
    name: Annotated[str, typer.Argument(metavar="ID", help="A Hugging Face id: owner/name.")],
) -> None:
    """Fetch a model from the Hugging Face hub to this machine, if it can run here."""
    from weaver.engine.torch.catalog import download

    model, folder = download(name)
    size = f"{model.num_parameters:,} parameters"
    sys.stdout.write(f"{model.name} ({model.architecture}, {size}) is in {folder}.\n")


@app.command()
def check(
    name: Annotated[str, typer.Argument(help="A name, a Hugging Face id or a folder.")],
    as_json: Json = False,
) -> None:
    """Say whether a model can be trained here, without loading its weights."""
    model = ask(lambda service: service.get_model(name))
    show_one(model.model_dump(mode="json"), as_json=as_json)
