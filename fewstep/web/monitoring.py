"""What operators watch: metrics for Prometheus, and a log of JSON lines."""

import json
import logging
from datetime import UTC, datetime
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

FIELDS = "fields"  # of a log record: what is told of the event, beside its name
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3, 6, 12, 25, 50, 100)


class Metrics:
    """A registry of its own, so that two apps in one process count apart."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        waited = "From a request's arrival until a server got it."
        generated = "What the model took, encoding included."
        self.wait = Histogram("fewstep_wait_seconds", waited, buckets=SECONDS, registry=registry)
        self.generation = Histogram("fewstep_paint_seconds", generated, buckets=SECONDS, registry=registry)
        self.rejections = Counter("fewstep_rejections", "Requests turned away.", ["code"], registry=registry)
        self.restarts = Counter("fewstep_restarts", "Cog servers that were replaced.", registry=registry)
        self.waiting = Gauge("fewstep_queue_length", "Requests that wait.", registry=registry)
        self.running = Gauge("fewstep_running", "Requests that are at a server.", registry=registry)
        self.clients = Gauge("fewstep_visitors", "Open pages.", registry=registry)
        self.workers = Gauge("fewstep_workers_ready", "Cog servers that paint.", registry=registry)

    def text(self) -> bytes:
        """Return all in Prometheus' format."""
        return generate_latest(self.registry)


class JsonLines(logging.Formatter):
    """A JSON object a line: time, level, event, and what is told of it. No prompts, names or keys are."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields)
