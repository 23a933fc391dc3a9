"""What Prometheus reads at /metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3, 6, 12, 25, 50, 100)


class Metrics:
    """A registry of its own, so that two apps in one process count apart."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        waited = "From a request's arrival until a server got it."
        generated = "What the model took, encoding included."
        self._wait = Histogram("fewstep_wait_seconds", waited, buckets=SECONDS, registry=registry)
        self._generate = Histogram("fewstep_paint_seconds", generated, buckets=SECONDS, registry=registry)
        self._rejections = Counter("fewstep_rejections", "Requests turned away.", ["code"], registry=registry)
        self._restarts = Counter("fewstep_restarts", "Cog servers that were replaced.", registry=registry)
        self.waiting = Gauge("fewstep_queue_length", "Requests that wait.", registry=registry)
        self.running = Gauge("fewstep_running", "Requests that are at a server.", registry=registry)
        self.clients = Gauge("fewstep_visitors", "Open pages.", registry=registry)
        self.workers = Gauge("fewstep_workers_ready", "Cog servers that paint.", registry=registry)

    def waited(self, seconds: float) -> None:
        """Observe that a request was sent to a server."""
        self._wait.observe(seconds)

    def generated(self, milliseconds: float) -> None:
        """Observe that an image came."""
        self._generate.observe(milliseconds / 1000)

    def rejected(self, code: str) -> None:
        """Count a request that was turned away."""
        self._rejections.labels(code).inc()

    def restarted(self) -> None:
        """Count a server that is replaced."""
        self._restarts.inc()

    def text(self) -> bytes:
        """Return all in Prometheus' format."""
        return generate_latest(self.registry)
