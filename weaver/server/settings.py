"""`ServerSettings`: all that the user of a server chooses, declared once.

`weaver serve` makes its flags, variables, file and help of the fields with a help; `run_server`
and `LocalService` are given the values.
"""

from __future__ import annotations

from dataclasses import dataclass

from weaver.config import EngineSettings, setting
from weaver.server.limits import SERVED, Limits


@dataclass(frozen=True, slots=True, kw_only=True)
class Durability:
    """Snapshots are taken after steps, when so many steps and so much time have passed.

    What lies behind the last one is replayed after a restart.
    """

    snapshot_every_s: float = setting(
        10.0, "Seconds, at least, between snapshots of a run.", name="snapshot_every", least=0
    )
    snapshot_every_steps: int = setting(1, "Steps, at least, between snapshots of a run.", least=1)
    unload_after_s: float = setting(
        1800.0,
        "Seconds after which an idle run leaves memory, until its next operation.",
        name="idle_run_seconds",
        least=0,
    )


DURABILITY = Durability()


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings(EngineSettings):
    """Of `weaver serve`."""

    host: str = setting("127.0.0.1", "The address to listen on.")
    port: int = setting(8000, "The port to listen on; 0 takes a free one.", least=0, most=2**16 - 1)
    models: list[str] | None = setting(
        None,
        "[NAME=]SOURCE to serve beside weaver-nano, a folder or Hugging Face id; repeatable, with "
        "spaces between in the variable.",
        name="model",
    )
    database_url: str | None = setting(
        None,
        "The database of all but checkpoints, for SQLAlchemy; without it, SQLite in the home.",
        secret=True,
    )
    auth: bool = setting(True, "Ask for API keys; refused to be off unless the host is loopback.")
    durability: Durability = DURABILITY
    limits: Limits = SERVED
    log_json: bool = setting(False, "Log one JSON object a line.")
    otel_endpoint: str | None = setting(
        None,
        "Of a collector of OpenTelemetry traces, such as http://127.0.0.1:4318; needs the extra "
        "`otel`.",
        variables=("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"),
    )
