"""`ServerSettings`: all that the user of a server chooses, declared once.

`weaver serve` makes its flags, variables, file and help of the fields with a help; `run_server`
and `LocalService` are given the values. `Limits` are asked by the service and its operations, and
of bodies by the HTTP front.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from weaver.config import EngineSettings, LogLevel, setting
from weaver.errors import QuotaExceededError, TooLargeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weaver.errors import WeaverError
    from weaver.types import JsonDict

COLLECT = "Collect results before sending more."


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a request may bring and a project may hold; None is without a limit."""

    body_bytes: int = setting(
        256 * 2**20, "Bytes of a request's body, decompressed.", name="max_body_bytes", least=2**16
    )
    """Those of JSON have smaller limits of their own beside it."""
    submissions: int = 1024
    """One request has at most so many."""
    operation_tokens: int | None = setting(
        2**22,
        "Tokens of the datums of a gradient pass, or of a sample's prompt and what it may draw; "
        "each further target, and each of the likeliest tokens that are asked for, counts as one.",
        name="max_operation_tokens",
        least=1,
    )
    tokens_trained: int | None = setting(
        None,
        "Tokens of a sequence in a gradient pass, even if the engine's memory holds more.",
        name="max_tokens_trained",
        least=1,
    )
    metadata_bytes: int | None = 2**16
    """Bytes of a session's or run's `user_metadata` as JSON: lists of them hold it all."""
    pending_operations: int | None = setting(
        2**14,
        "Operations of a project whose outcome its client has not collected.",
        name="max_pending",
        least=256,
    )
    pending_bytes: int | None = setting(
        2**30,
        "About the bytes of these operations and of outcomes that are kept; and of the gradient "
        "passes of a project's runs that only the journal holds.",
        name="max_pending_bytes",
        least=2**26,
    )
    sessions: int | None = setting(
        1024, "Open sessions of a project.", name="max_sessions", least=1
    )
    """Those that wire formats without sessions share do not count."""
    metric_points: int | None = setting(
        10**6, "Logged numbers of a run.", name="max_metric_points", least=1
    )
    metric_names: int | None = 10_000
    """Names of a run's logged numbers."""
    runs: int | None = setting(None, "Runs of a project.", name="max_runs", least=0)
    stored_bytes: int | None = setting(
        None,
        "Bytes of a project's checkpoints and of its samplers without a name.",
        name="max_stored_bytes",
        least=0,
    )
    """Merged exports have a bound of their own, for all projects together."""
    import_bytes: int | None = setting(
        2**36, "Bytes of the files of one import.", name="max_import_bytes", least=2**20
    )
    imports: int | None = 8
    """Of a project that have begun and are no checkpoints yet."""
    session_timeout_s: float = setting(
        math.inf,
        "Seconds after which the session of a silent client is closed.",
        name="session_timeout",
        least=120,
    )
    unnamed_samplers: int = 64
    """The newest of a session are kept."""

    def check_tokens(self, tokens: int) -> None:
        """Raises TooLargeError: those of an operation."""
        words = "the operation has {} tokens, the limit is {}."
        _check(tokens, self.operation_tokens, TooLargeError, words, "Split it.")

    def check_trained(self, lengths: Sequence[int], *, fitting: int | None) -> None:
        """Raises TooLargeError: a sequence of a gradient pass, or what fits the engine's memory."""
        hint = "Shorten it, or give the engine more memory: see `weaver doctor` on its machine."
        words = "has {} tokens, at most {} can be trained."
        for limit in (fitting, self.tokens_trained):
            for i, length in enumerate(lengths):
                field = f"datums[{i}].model_input"
                _check(length, limit, TooLargeError, words, hint, field=field)

    def check_metadata(self, metadata: JsonDict) -> None:
        """Raises TooLargeError."""
        if self.metadata_bytes is not None:
            size, words = len(json.dumps(metadata)), "has {} bytes, the limit is {}."
            hint, field = "Name things in it, and keep them elsewhere.", "user_metadata"
            _check(size, self.metadata_bytes, TooLargeError, words, hint, field=field)

    def check_bytes(self, pending: int, *, new: int) -> None:
        """Raises QuotaExceededError: trying again later helps; TooLargeError: it does not."""
        words = "the operations have {} bytes, those of a project may have {}."
        _check(new, self.pending_bytes, TooLargeError, words, "Split them.")
        if new:
            words = "{} bytes would be pending, the limit of a project is {}."
            _check(pending + new, self.pending_bytes, QuotaExceededError, words, COLLECT)

    def check_journal(self, unsaved: int) -> None:
        """Raises QuotaExceededError: no more gradient passes before a step."""
        words = (
            "{} bytes of gradient passes would be in no snapshot of the project's runs, "
            "the limit is {}."
        )
        hint = "Take an optim_step, or delete runs."
        _check(unsaved, self.pending_bytes, QuotaExceededError, words, hint)

    def check_pending(self, pending: int, *, new: int) -> None:
        """Raises QuotaExceededError: trying again later helps."""
        if new:
            words = "{} operations would be pending, the limit of a project is {}."
            _check(pending + new, self.pending_operations, QuotaExceededError, words, COLLECT)

    def check_sessions(self, sessions: int) -> None:
        """Raises QuotaExceededError: there is no room for another one."""
        words = "the project has {} open sessions, the limit is {}."
        hint = "Close one; that of a silent client closes by itself."
        _check(sessions, self.sessions, QuotaExceededError, words, hint, more=1)

    def check_metrics(self, *, names: int, points: int) -> None:
        """Raises TooLargeError: a run would have more metrics than there is room for."""
        hint, field = "Log fewer of them, or go on in another run.", "metrics"
        words = "the run would have {} names of metrics, the limit is {}."
        _check(names, self.metric_names, TooLargeError, words, hint, field=field)
        words = "the run would have {} logged numbers, the limit is {}."
        _check(points, self.metric_points, TooLargeError, words, hint, field=field)

    def check_runs(self, runs: int) -> None:
        """Raises QuotaExceededError: there is no room for another one."""
        words = "the project has {} runs, the limit is {}."
        hint = "Delete one, or ask an administrator."
        _check(runs, self.runs, QuotaExceededError, words, hint, more=1)

    def check_import(self, size_bytes: int) -> None:
        """Raises TooLargeError."""
        words = "the import has {} bytes, the limit is {}."
        _check(size_bytes, self.import_bytes, TooLargeError, words, "Import a smaller model.")

    def check_imports(self, imports: int) -> None:
        """Raises QuotaExceededError: there is no room for another one."""
        words = "the project has begun {} imports, the limit is {}."
        hint = "End one; those of silent clients are forgotten after an hour."
        _check(imports, self.imports, QuotaExceededError, words, hint, more=1)

    def check_stored(self, stored_bytes: int) -> None:
        """Raises QuotaExceededError: there is no room for another checkpoint."""
        words = "the project's checkpoints have {} bytes, the limit is {}."
        hint = "Delete some, or give them a time to live."
        _check(stored_bytes, self.stored_bytes, QuotaExceededError, words, hint, more=1)


def _check(
    count: int,
    limit: int | None,
    error: type[WeaverError],
    words: str,
    hint: str,
    *,
    field: str | None = None,
    more: int = 0,
) -> None:
    """Raises the error if there are more than its limit, `more` that come included."""
    if limit is not None and count + more > limit:
        raise error(words.format(count, limit), field=field, hint=hint)


SERVED = Limits(session_timeout_s=600.0)
"""Those of a server. A client rides out five minutes without it, and is heard of each minute."""
EMBEDDED = Limits(
    operation_tokens=None,
    metadata_bytes=None,
    pending_operations=None,
    pending_bytes=None,
    sessions=None,
    metric_points=None,
    metric_names=None,
    import_bytes=None,
    imports=None,
)
"""Those of the engine in a user's own process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Durability:
    """Snapshots are taken after steps, when so many steps and so much time have passed.

    And when the run has computed for long enough to be worth one: see `Recovery.due`. What lies
    behind the last one is replayed after a restart.
    """

    snapshot_every_s: float = setting(
        10.0,
        "Seconds, at least, between snapshots of a run; more where one costs much, unless it is 0.",
        name="snapshot_every",
        least=0,
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
    """The settings of `weaver serve`."""

    host: str = setting("127.0.0.1", "The address to listen on.")
    port: int = setting(8000, "The port to listen on; 0 takes a free one.", least=0, most=2**16 - 1)
    models: list[str] | None = setting(
        None,
        "[NAME=]SOURCE[,context=TOKENS][,load=start] to serve beside weaver-nano, a folder or "
        "Hugging Face id; repeatable, with spaces between in the variable.",
        name="model",
    )
    cluster: Path | None = setting(
        None, "A TOML file of trainer groups, whose ranks Ray places; needs the extra `cluster`."
    )
    ray: str | None = setting(
        None,
        "The Ray to train on: auto (that of this machine, else one is started), local (one is "
        "started) or host:port. Without --cluster a rank for each model.",
    )
    database_url: str | None = setting(
        None,
        "The database of all but checkpoints, for SQLAlchemy; without it, SQLite in the home.",
        secret=True,
    )
    auth: bool = setting(True, "Ask for API keys; refused to be off unless the host is loopback.")
    durability: Durability = DURABILITY
    limits: Limits = SERVED
    log_level: LogLevel = setting(
        "info", "What is logged at least; at debug each sample and each request that only reads."
    )
    log_json: bool = setting(False, "Log one JSON object a line.")
    otel_endpoint: str | None = setting(
        None,
        "Of a collector of OpenTelemetry traces, such as http://127.0.0.1:4318; needs the extra "
        "`otel`.",
        variables=("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"),
    )
