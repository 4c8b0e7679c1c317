"""The times of calls as Prometheus metrics of the trainer's process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kt_expert_client.errors import InvalidRequest
from kt_expert_client.profile.times import PARTS, CallTimes

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)  # seconds


class CallMetrics:
    """A listener. kt_expert_client_call_seconds{op, part} and kt_expert_client_tokens_total{op}."""

    def __init__(self, registry: CollectorRegistry | None) -> None:
        """None: the library's default registry. Raises InvalidRequest where prometheus-client is not installed, or where the
        registry has such metrics already."""
        try:
            from prometheus_client import REGISTRY, Counter, Histogram
        except ImportError as error:
            raise InvalidRequest("metrics of a trainer need prometheus-client: pip install prometheus-client") from error
        registry = registry or REGISTRY
        try:
            self._seconds = Histogram(
                "kt_expert_client_call_seconds", "Time of a call by part", ["op", "part"], buckets=_BUCKETS, registry=registry
            )
            self._tokens = Counter("kt_expert_client_tokens", "Tokens of calls", ["op"], registry=registry)
        except ValueError:
            raise InvalidRequest(
                "the registry has the metrics of another client already; give each client a registry of its own"
            ) from None

    def __call__(self, times: CallTimes) -> None:
        parts = times.parts
        for name in PARTS:
            self._seconds.labels(times.op, name).observe(getattr(parts, name))
        self._tokens.labels(times.op).inc(times.tokens)
