"""Bounds that keep one trainer from starving the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes in bytes, times in seconds."""

    max_tokens: int = 65536  # per request; a micro-batch of 64 sequences of 1024
    max_request_bytes: int = 4 * 1024**3  # tensors and results of one request
    credit_requests: int = 4  # in flight per member: two micro-batches, each with one call ahead
    credit_bytes: int = 4 * 1024**3  # in flight per member
    max_members: int = 64  # over all runs
    max_streams: int = 256
    join_s: float = 30.0  # a stream that has not joined by then is ended
    lease_s: float = 30.0  # a member without a stream for this long may lose its rank
    retention_s: float = 900.0  # and for this long after that it is kept, unless the memory is needed
    run_ttl_s: float = 24 * 3600.0  # a named run without members for this long is closed
    default_deadline_s: float = 600.0  # of a request that names none
    max_deadline_s: float = 7 * 24 * 3600.0
    checkpoint_every_steps: int = 0  # restart points of a run; 0: none but the last one before the server stops
    checkpoint_every_s: float = 0.0
    keep_checkpoints: int = 2  # automatic ones of a run
    quotas: Mapping[str, int] = field(default_factory=dict)  # bytes an identity may have; names as in engine/quotas.py
