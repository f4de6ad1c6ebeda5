"""What Prometheus is told."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from lcl_adapter.serve.engine import Engine


class Metrics:
    """Prometheus, in a registry of its own so that several servers fit into one process."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("lcl_requests", "Requests by route and status.", ["route", "status"], registry=self.registry)
        self.seconds = Histogram("lcl_request_seconds", "How long they took.", ["route"], registry=self.registry)
        self.images = Counter("lcl_images_classified", "Images judged.", registry=self.registry)
        self.registry.register(_OfEngine(engine))

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _OfEngine(Collector):
    """Read when asked, so that the engine knows nothing of Prometheus."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def collect(self) -> Any:
        for name, value in vars(self.engine.counters).items():
            yield CounterMetricFamily(f"lcl_{name}", f"Of the engine: {name}.", value=value)
        yield GaugeMetricFamily("lcl_kept_sets", "Prefilled sets in memory.", value=len(self.engine.cache))
        yield GaugeMetricFamily("lcl_kept_bytes", "What they take.", value=self.engine.cache.bytes)
        yield GaugeMetricFamily("lcl_kept_bytes_limit", "What they may take.", value=self.engine.cache.budget)
        yield GaugeMetricFamily("lcl_queue", "Jobs that wait.", value=self.engine.waiting)
