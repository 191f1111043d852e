"""`GET /metrics`: what Prometheus reads, by the names that users of vLLM know, under our prefix, and our own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Final, final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from agentspeed.server.finish_reasons import FINISH
from agentspeed.usage import Usage

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS: Final = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_STATES: Final = ("held", "queued", "promoting", "prefilling", "decoding", "settling")


@final
class Metrics:
    """Counted here at the end of each turn; what the engine counts is asked of it when somebody reads."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._engine = _EngineCounts()
        self._registry.register(self._engine)
        made = self._registry
        self.prompt = Counter("agentspeed:prompt_tokens", "Tokens that models had read when they spoke.", registry=made)
        self.generation = Counter("agentspeed:generation_tokens", "Tokens drawn.", registry=made)
        self.queries = Counter("agentspeed:prefix_cache_queries", "Tokens of prompts looked up.", registry=made)
        self.hits = Counter("agentspeed:prefix_cache_hits", "Tokens of prompts that were not computed.", registry=made)
        self.recomputed = Counter(
            "agentspeed:recomputed_tokens", "Tokens whose rows had been lost, by why.", ["why"], registry=made
        )
        self.resumed = Counter(
            "agentspeed:resumed_tokens", "Tokens whose rows were kept, by where.", ["tier"], registry=made
        )
        self.success = Counter(
            "agentspeed:request_success", "Turns that ended, by why.", ["finished_reason"], registry=made
        )
        self.failed = Counter(
            "agentspeed:request_failed", "Requests that were refused or failed, by code.", ["code"], registry=made
        )
        self.forks = Counter("agentspeed:forks", "Branches that requests made.", registry=made)
        self.matched = Counter(
            "agentspeed:history_matches", "Conversations, by how they found their session.", ["verb"], registry=made
        )
        self.queue = Histogram(
            "agentspeed:request_queue_time_seconds", "From asking to being admitted.", buckets=_SECONDS, registry=made
        )
        self.first = Histogram(
            "agentspeed:time_to_first_token_seconds", "From asking to the first token.", buckets=_SECONDS, registry=made
        )
        self.latency = Histogram(
            "agentspeed:inter_token_latency_seconds",
            "Between tokens of a turn, on average.",
            buckets=_SECONDS,
            registry=made,
        )
        self.whole = Histogram(
            "agentspeed:e2e_request_latency_seconds", "From asking to the last token.", buckets=_SECONDS, registry=made
        )
        self.requests = Gauge("agentspeed:http_requests_running", "Requests in work.", registry=made)
        self.idle = Gauge("agentspeed:history_sessions_idle", "Sessions that wait to go on.", registry=made)

    def turn(self, usage: Usage, reason: str, seconds: float) -> None:
        """One turn that ended."""
        prompt = usage.new + usage.resumed + usage.recomputed
        self.prompt.inc(prompt)
        self.queries.inc(prompt)
        self.hits.inc(usage.prefill_saved)
        self.generation.inc(usage.drawn)
        self.resumed.labels("device").inc(usage.resumed_device)
        self.resumed.labels("host").inc(usage.resumed_host)
        if usage.recomputed:
            self.recomputed.labels(usage.why or "unknown").inc(usage.recomputed)
        self.success.labels(FINISH.get(reason, reason)).inc()
        self.queue.observe(usage.queue_seconds)
        self.first.observe(usage.queue_seconds + usage.prefill_seconds)
        if usage.drawn > 1:
            self.latency.observe(usage.decode_seconds / (usage.drawn - 1))
        self.whole.observe(seconds)

    def scored(self, usage: Usage, seconds: float) -> None:
        """Tokens of a prompt whose log-probabilities were asked for: nobody drew them."""
        self.turn(replace(usage, new=usage.new + usage.drawn, drawn=0), "scored", seconds)

    def page(self, counts: Mapping[str, int]) -> bytes:
        """The text that Prometheus reads; `counts` are the engine's."""
        self._engine.counts = counts
        return generate_latest(self._registry)


@final
class _EngineCounts(Collector):
    """The engine's own counts as gauges."""

    def __init__(self) -> None:
        self.counts: Mapping[str, int] = {}

    def collect(self) -> Iterator[Metric]:
        """By their names, and as vLLM calls those that it has too."""
        counts = self.counts
        if not counts:
            return
        running = sum(counts[f"branches_{state}"] for state in ("promoting", "prefilling", "decoding", "settling"))
        yield _gauge("num_requests_running", "Turns in work.", running)
        yield _gauge("num_requests_waiting", "Turns that wait for room.", counts["branches_queued"])
        total = counts["pages_total"]
        used = total - counts["pages_free"]
        yield _gauge(
            "kv_cache_usage_perc", "Share of the pool's pages that hold rows; 1 is all.", used / total if total else 0.0
        )
        branches = GaugeMetricFamily("agentspeed:branches", "Branches by state.", labels=["state"])
        for state in _STATES:
            branches.add_metric([state], counts[f"branches_{state}"])
        yield branches
        pages = GaugeMetricFamily("agentspeed:pages", "Pages of the pool by owner.", labels=["owner"])
        for owner in ("free", "tail", "nodes", "firm"):
            pages.add_metric([owner], counts[f"pages_{owner}"])
        yield pages
        named = {"pages_total", "pages_free", "pages_tail", "pages_nodes", "pages_firm"}
        for name, value in counts.items():
            if name not in named and not name.startswith("branches_"):
                yield _gauge(f"engine_{name}", "As the engine counts it.", value)


def _gauge(name: str, text: str, value: float) -> Metric:
    made = GaugeMetricFamily(f"agentspeed:{name}", text)
    made.add_metric([], value)
    return made
