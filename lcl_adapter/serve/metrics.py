"""Metrics for Prometheus."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from lcl_adapter.serve.engine import Engine
from lcl_adapter.serve.http.connections import COUNTERS
from lcl_adapter.serve.pictures.pool import DECODERS


class Metrics:
    """The server's metrics, in a registry of their own, so that several servers fit into one process."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("lcl_requests", "Requests by route and status.", ["route", "status"], registry=self.registry)
        self.seconds = Histogram("lcl_request_seconds", "Duration of requests by route, once they have arrived.", ["route"], registry=self.registry)
        self.images = Counter("lcl_images_classified", "Classified images.", registry=self.registry)
        self.registry.register(_EngineCollector(engine))

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _EngineCollector(Collector):
    """Reads the engine's counters when Prometheus asks, so that the engine does not depend on Prometheus."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def collect(self) -> Any:
        for name, value in vars(self.engine.counters).items():
            yield CounterMetricFamily(f"lcl_{name}", f"Count of the engine: {name}.", value=value)
        for name, value in vars(DECODERS.counters).items():
            yield CounterMetricFamily(f"lcl_{name}", f"Count of the processes that decode pictures: {name}.", value=value)
        for name, value in vars(COUNTERS).items():
            yield CounterMetricFamily(f"lcl_{name}", f"Count of the server: {name}.", value=value)
        yield GaugeMetricFamily("lcl_kept_sets", "Prefilled sets in the cache.", value=len(self.engine.cache))
        yield GaugeMetricFamily("lcl_kept_bytes", "Bytes of the prefilled sets in the cache.", value=self.engine.cache.bytes)
        yield GaugeMetricFamily("lcl_kept_bytes_limit", "Bytes that the cache may use.", value=self.engine.cache.budget)
        yield GaugeMetricFamily("lcl_queue", "Jobs and tasks that wait.", value=self.engine.waiting)
