"""Prometheus counters of one app; `GET /metrics` shows them. Labels never name a tenant."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from prometheus_client.metrics_core import Metric

    from weaver.protocol import Outcome, Submission
    from weaver.server.activity import Activity


class ServerMetrics(Collector):
    def __init__(self, activity: Activity) -> None:
        self._registry = registry = CollectorRegistry()
        self._activity = activity
        registry.register(self)
        self._requests = Counter(
            "weaver_http_requests_total",
            "Requests answered.",
            ["method", "route", "status"],
            registry=registry,
        )
        self._seconds = Histogram(
            "weaver_http_request_seconds",
            "Time to answer; long polls wait on purpose.",
            ["route"],
            registry=registry,
        )
        self.running = Gauge(
            "weaver_http_requests_running", "Requests being answered.", registry=registry
        )
        self._submissions = Counter(
            "weaver_submissions_total", "Operations accepted.", ["kind"], registry=registry
        )
        self._outcomes = Counter(
            "weaver_outcomes_total", "Outcomes handed out.", ["kind"], registry=registry
        )

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def submitted(self, submissions: Sequence[Submission]) -> None:
        for submission in submissions:
            kind = submission.operation.kind if submission.operation else "withdrawn"
            self._submissions.labels(kind).inc()

    def collected(self, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            kind = outcome.result.kind if outcome.result else "error"
            self._outcomes.labels(kind).inc()

    def collect(self) -> Iterator[Metric]:
        """What the service is doing, asked when the metrics are."""
        tokens = CounterMetricFamily("weaver_tokens", "Tokens computed.", labels=["kind"])
        tokens.add_metric(["trained"], self._activity.trained_tokens)
        tokens.add_metric(["sampled"], self._activity.sampled_tokens)
        yield tokens
        states = [ticket.began_at is not None for ticket in self._activity.pending()]
        pending = GaugeMetricFamily(
            "weaver_operations_pending", "Operations without an outcome.", labels=["state"]
        )
        pending.add_metric(["running"], sum(states))
        pending.add_metric(["waiting"], len(states) - sum(states))
        yield pending
        held = GaugeMetricFamily(
            "weaver_pending_bytes", "About, of operations and outcomes until they are collected."
        )
        held.add_metric([], self._activity.held_bytes)
        yield held

    def render(self) -> bytes:
        return generate_latest(self._registry)
