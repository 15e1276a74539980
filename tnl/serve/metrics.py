"""What GET /metrics tells, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tnl.generate.engine import Engine

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """One server's registry."""

    def __init__(self, engine: Engine) -> None:
        # a time of creation beside every counter is of no use to anybody
        disable_created_metrics()
        self.registry = CollectorRegistry()
        self.requests = Counter("tnl_requests", "HTTP requests by route and status", ["route", "status"], registry=self.registry)
        self.first_token = Histogram("tnl_first_token_seconds", "From a request to its first text", buckets=SECONDS, registry=self.registry)
        self.seconds = Histogram(
            "tnl_answer_seconds", "From a request to the end of all its answers", buckets=SECONDS, registry=self.registry
        )
        self.registry.register(EngineCollector(engine))

    def text(self) -> bytes:
        """The page."""
        return generate_latest(self.registry)


class EngineCollector(Collector):
    """Reads the engine's own counts when it is asked."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def collect(self) -> Iterator[Metric]:
        engine, load = self.engine, self.engine.load
        yield GaugeMetricFamily("tnl_queue_waiting", "Requests that wait for a slot", load["waiting"])
        yield GaugeMetricFamily("tnl_prompts_reading", "Prompts that are being read", load["reading"])
        yield GaugeMetricFamily("tnl_slots", "Answers that can run at a time", load["slots"])
        yield GaugeMetricFamily("tnl_slots_free", "Slots that nobody has", load["free"])
        yield GaugeMetricFamily("tnl_state_bytes", "Memory of the slots' states", engine.slots.num_bytes)
        yield GaugeMetricFamily("tnl_adapters_loaded", "Adapters in memory", len(engine.adapters.keys))
        yield GaugeMetricFamily("tnl_prefix_bytes", "Memory of the prefix states", engine.prefixes.used)
        yield GaugeMetricFamily("tnl_engine_alive", "Whether requests are worked on", int(engine.alive))
        yield CounterMetricFamily("tnl_prompt_tokens", "Tokens of prompts that were read", engine.counts.prompt_tokens)
        yield CounterMetricFamily("tnl_generated_tokens", "Tokens of answers that have ended", engine.counts.generated_tokens)
        yield CounterMetricFamily("tnl_decoding_steps", "Steps of the running slots", engine.counts.steps)
        yield CounterMetricFamily("tnl_prefix_hits", "Prompts whose beginning was kept", engine.prefixes.hits)
        yield CounterMetricFamily("tnl_prefix_misses", "Prompts that were read from the start", engine.prefixes.misses)
        yield CounterMetricFamily("tnl_prefix_tokens", "Tokens that did not have to be read", engine.prefixes.saved_tokens)
        answers = CounterMetricFamily("tnl_answers", "Answers by how they ended", labels=["finish"])
        for finish in ("stop", "length", "cancelled", "error"):
            answers.add_metric([finish], engine.counts.finished[finish])
        yield answers
