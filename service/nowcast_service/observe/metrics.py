"""What Prometheus sees. One registry per application, so that several can live in one process."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)
_AGES = (0.1, 1, 3, 10, 30, 60, 120, 300, 600, 1800, 3600)


class Metrics:
    """The service's counters, gauges and histograms."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self.requests = Counter(
            "nowcast_requests", "HTTP requests answered.", ["route", "method", "status"], registry=registry
        )
        self.nowcasts = Counter("nowcast_nowcasts", "Nowcasts finished.", ["predictor", "result"], registry=registry)
        self.failures = Counter("nowcast_failures", "Calls that failed, by error code.", ["reason"], registry=registry)
        self.stages = Histogram(
            "nowcast_stage_seconds",
            "Time of a nowcast by stage: queue, input, compute, output.",
            ["stage"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.bytes = Counter(
            "nowcast_bytes", "Bytes of bodies received (in) and sent (out).", ["direction"], registry=registry
        )
        self.age = Histogram(
            "nowcast_snapshot_age_seconds",
            "Age of the newest snapshot when its nowcast began.",
            buckets=_AGES,
            registry=registry,
        )
        self.verdicts = Counter(
            "nowcast_verdicts",
            "What became of nowcasts in training, as clients report it.",
            ["outcome"],
            registry=registry,
        )
        self.snapshots = Counter("nowcast_snapshots", "Snapshots received whole and checked.", registry=registry)
        self.dropped = Counter(
            "nowcast_sessions_dropped", "Sessions dropped, by reason.", ["reason"], registry=registry
        )
        self.queue = Gauge("nowcast_queue_depth", "Nowcasts waiting for the device.", registry=registry)
        self.running = Gauge("nowcast_running", "Nowcasts on the device.", registry=registry)
        self.sessions = Gauge("nowcast_sessions", "Sessions held.", registry=registry)
        self.held = Gauge("nowcast_held_bytes", "Bytes reserved for histories, uploads and answers.", registry=registry)
        self.budget = Gauge("nowcast_budget_bytes", "Bytes that may be reserved.", registry=registry)
        self.ready = Gauge("nowcast_ready", "1 when the last readiness check passed.", registry=registry)
        for direction in ("in", "out"):
            self.bytes.labels(direction)
        for outcome in ("applied", "kept", "rejected", "rolled_back", "shadow"):
            self.verdicts.labels(outcome)
        for stage in ("queue", "input", "compute", "output"):
            self.stages.labels(stage)

    def watch(self, gauge: Gauge, read: Callable[[], float]) -> None:
        """Have a gauge read its value when it is scraped."""
        gauge.set_function(read)

    def render(self) -> bytes:
        """The text Prometheus scrapes."""
        return generate_latest(self.registry)
