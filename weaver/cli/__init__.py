"""The command `weaver`: one file for each group of commands, all below `app`.

Modules import typer alone; what a command needs is imported when it runs, so that `--help` is
quick.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from weaver.cli import checkpoints, cluster, doctor, evaluation, logs, models, runs, serve, up
from weaver.config import LogLevel, environment
from weaver.errors import WeaverError

app = typer.Typer(
    name="weaver",
    help="Post-training of language models. WEAVER_BASE_URL and WEAVER_API_KEY choose a server; "
    "without them, commands run in this process, below WEAVER_HOME.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        import weaver

        print(weaver.__version__)
        raise typer.Exit


@app.callback()
def _begin(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it, and end.")
    ] = False,
    log_level: Annotated[
        LogLevel | None,
        typer.Option(envvar="WEAVER_LOG_LEVEL", help="What is said on stderr at least."),
    ] = None,
) -> None:
    if log_level is not None:
        import logging

        environment()["WEAVER_LOG_LEVEL"] = log_level  # `weaver serve` reads it
        number = logging.getLevelNamesMapping()[log_level.upper()]
        form = "%(levelname)s %(name)s: %(message)s"
        logging.basicConfig(level=max(number, logging.INFO), format=form)
        logging.getLogger("weaver").setLevel(number)


app.command("up")(up.up)
app.command("serve")(serve.serve)
app.command("logs")(logs.logs)
app.command("doctor")(doctor.doctor)
app.command("sessions")(runs.sessions)
app.command("sample")(models.sample)
app.command("chat")(models.chat)
app.add_typer(serve.keys, name="keys")
app.add_typer(models.app, name="models")
app.add_typer(cluster.app, name="cluster")
app.add_typer(runs.runs, name="runs")
checkpoints.app.command("eval")(evaluation.evaluate)
app.add_typer(checkpoints.app, name="checkpoints")


def main() -> None:
    """Runs the command; an error that can be mended is one line on stderr and exit code 1."""
    try:
        app()
    except (WeaverError, OSError) as error:  # a full disk, a folder that cannot be written to
        sys.stderr.write(f"error: {error}\n")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
