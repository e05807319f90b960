"""Prometheus metrics: requests as they end, and the engine's statistics at every scrape."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lockstep.rl.rollout.protocol import Statistics

GAUGES = {
    "running": "Completions that are computed.",
    "waiting": "Completions that wait for room.",
    "blocks_used": "Blocks of the cache that completions hold.",
    "blocks_free": "Blocks of the cache that can be taken.",
}
COUNTERS = {
    "prompt_tokens": "Tokens of prompts.",
    "cached_prompt_tokens": "Tokens of prompts that were found in the cache.",
    "generated_tokens": "Tokens of completions.",
    "preemptions": "Completions that were put back because blocks ran out.",
    "proposed_tokens": "Tokens that were computed on trial (prompt-lookup speculation).",
    "accepted_tokens": "Tokens on trial that the model then drew.",
}
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)


class EngineNumbers(Collector):
    """A Prometheus collector of an engine's statistics."""

    def __init__(self, statistics: Callable[[], Statistics]) -> None:
        self._statistics = statistics

    def collect(self) -> Iterator[Metric]:
        """Gauges and counters of the engine at this moment."""
        now = self._statistics()
        for name, text in GAUGES.items():
            yield GaugeMetricFamily(f"lockstep_{name}", text, value=getattr(now, name))
        for name, text in COUNTERS.items():
            yield CounterMetricFamily(f"lockstep_{name}", text, value=getattr(now, name))


class Metrics:
    """All metrics of one server."""

    def __init__(self, statistics: Callable[[], Statistics]) -> None:
        self._registry = registry = CollectorRegistry()
        registry.register(EngineNumbers(statistics))
        self.requests = Counter("lockstep_requests", "Requests that ended.", ["path", "status"], registry=registry)
        """Number of requests by path and status; the status is 499 where the client closed the connection."""
        self.seconds = Histogram(
            "lockstep_request_seconds", "Up to the last byte.", ["path"], buckets=SECONDS, registry=registry
        )
        self.first_token_seconds = Histogram(
            "lockstep_first_token_seconds", "Up to the first token.", buckets=SECONDS, registry=registry
        )

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)
