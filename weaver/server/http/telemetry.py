"""What a server says of itself: log lines, counters, and where its event loop stands, if it does.

Spans for a collector are in `tracing.py`, as they need packages of their own.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
import traceback
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

import anyio
from prometheus_client import core as prometheus
from prometheus_client import generate_latest, registry

from weaver.server.logs import CONTROL, LogFile

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence
    from pathlib import Path

    from weaver.config import LogLevel
    from weaver.engine.base import Engine
    from weaver.protocol import Outcome, Submission
    from weaver.server.activity import Activity

logger = logging.getLogger(__name__)

# --- logs: each line with its request's id; as text, or as JSON for collectors --------------------

request_id: ContextVar[str] = ContextVar("request_id", default="-")
"""The request in whose course a log line is written."""
TEXT = "%(asctime)s %(levelname)s %(name)s [%(request_id)s] %(message)s"


def configure_logs(*, as_json: bool, level: LogLevel = "info", home: Path | None = None) -> None:
    """Sends all logs of the process to stderr, and as JSON to the file of a home.

    Called once, by `weaver serve`. Libraries are not asked for more than INFO.
    """
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    handlers[0].setFormatter(JsonFormatter() if as_json else TextFormatter(TEXT))
    if home is not None:
        handlers.append(LogFile(home))
        handlers[1].setFormatter(JsonFormatter())
    for handler in handlers:
        handler.addFilter(_add_request_id)
    number = logging.getLevelNamesMapping()[level.upper()]
    logging.basicConfig(level=max(number, logging.INFO), handlers=handlers, force=True)
    logging.getLogger("weaver").setLevel(number)
    for library in ("httpx", "uvicorn"):
        logging.getLogger(library).setLevel(logging.WARNING)


class TextFormatter(logging.Formatter):
    """What a request brought must not look like a line of its own, or move a terminal's cursor."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return CONTROL.sub(lambda found: ascii(found[0])[1:-1], super().formatMessage(record))


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname,
            "logger": record.name,
            "request_id": getattr(record, "request_id", "-"),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _add_request_id(record: logging.LogRecord) -> bool:
    record.request_id = request_id.get()
    return True


# --- counters -------------------------------------------------------------------------------------


class ServerMetrics(registry.Collector):
    """Prometheus counters of one app; `GET /metrics` shows them. Labels never name a tenant."""

    def __init__(self, activity: Activity, engine: Engine) -> None:
        self._registry = prometheus.CollectorRegistry()
        self._activity = activity
        self._engine = engine
        self._registry.register(self)
        labels = ["method", "route", "status"]
        self._requests = prometheus.Counter(
            "weaver_http_requests_total", "Requests answered.", labels, registry=self._registry
        )
        waits = "Time to answer; long polls wait on purpose."
        self._seconds = prometheus.Histogram(
            "weaver_http_request_seconds", waits, ["route"], registry=self._registry
        )
        self.running = prometheus.Gauge(
            "weaver_http_requests_running", "Requests being answered.", registry=self._registry
        )
        self._submissions = prometheus.Counter(
            "weaver_submissions_total", "Operations accepted.", ["kind"], registry=self._registry
        )
        self._outcomes = prometheus.Counter(
            "weaver_outcomes_total", "Outcomes handed out.", ["kind"], registry=self._registry
        )

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def submitted(self, submissions: Sequence[Submission]) -> None:
        for submission in submissions:
            self._submissions.labels(submission.kind).inc()

    def collected(self, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            kind = outcome.result.kind if outcome.result else "error"
            self._outcomes.labels(kind).inc()

    def collect(self) -> Iterator[prometheus.Metric]:
        """What the service is doing, asked when the metrics are."""
        activity = self._activity
        tokens = prometheus.CounterMetricFamily(
            "weaver_tokens", "Tokens computed.", labels=["kind"]
        )
        tokens.add_metric(["trained"], activity.trained_tokens)
        tokens.add_metric(["sampled"], activity.sampled_tokens)
        yield tokens
        for name, count in self._engine.counts.items():
            words = f"{name.replace('_', ' ').capitalize()} of the engine."
            yield prometheus.CounterMetricFamily(f"weaver_engine_{name}", words, value=count)
        for name, level in self._engine.gauges.items():
            words = f"{name.replace('_', ' ').capitalize()} of the engine."
            yield prometheus.GaugeMetricFamily(f"weaver_engine_{name}", words, value=level)
        states = [ticket.began_at is not None for ticket in activity.pending()]
        pending = prometheus.GaugeMetricFamily(
            "weaver_operations_pending", "Operations without an outcome.", labels=["state"]
        )
        pending.add_metric(["running"], sum(states))
        pending.add_metric(["waiting"], len(states) - sum(states))
        yield pending
        held = "About, of operations and outcomes until they are collected."
        yield prometheus.GaugeMetricFamily("weaver_pending_bytes", held, value=activity.held_bytes)
        freed = "Of checkpoints, exports and imports that expired, and what was left half written."
        yield prometheus.CounterMetricFamily(
            "weaver_swept_bytes", freed, value=activity.freed_bytes
        )
        unsaved = "About, of gradient passes that no snapshot holds."
        yield prometheus.GaugeMetricFamily(
            "weaver_journaled_bytes", unsaved, value=activity.unsaved_bytes
        )

    def render(self) -> bytes:
        return generate_latest(self._registry)


# --- the event loop -------------------------------------------------------------------------------

BEAT_S = 0.25
STILL_S = 1.0
QUIET_S = 60.0
"""Between two reports, however often it stands still."""


@asynccontextmanager
async def watch() -> AsyncIterator[None]:
    """Looks at the loop that runs this, for as long as it is entered.

    A loop that is held up cannot say so itself, so a thread looks at it.
    """
    ended, loop_thread, beat_at = threading.Event(), threading.get_ident(), time.monotonic()

    async def beat() -> None:
        nonlocal beat_at
        while True:
            beat_at = time.monotonic()
            await anyio.sleep(BEAT_S)

    def look() -> None:
        reported_at = -QUIET_S
        while not ended.wait(BEAT_S):
            now = time.monotonic()
            still_s = now - beat_at
            if still_s > STILL_S and now > reported_at + QUIET_S:
                reported_at = now
                frame = sys._current_frames().get(loop_thread)
                where = "".join(traceback.format_stack(frame))
                logger.warning("the event loop stands still for %.1f s at\n%s", still_s, where)

    threading.Thread(target=look, name="watchdog", daemon=True).start()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(beat)
        try:
            yield
        finally:
            ended.set()
            tasks.cancel_scope.cancel()
