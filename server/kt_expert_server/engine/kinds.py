"""What memory is reserved for."""

from __future__ import annotations

from enum import StrEnum


class Kind(StrEnum):
    WEIGHTS = "weights"
    RUNTIME = "runtime"
    ADAPTERS = "adapters"
    GRADIENTS = "gradients"
    OPTIMIZER = "optimizer"
    TICKETS = "tickets"
    KEPT = "kept"  # scratch, buffers and memory of tickets that are gone, for operations to come
    REQUESTS = "requests"
    OUTCOMES = "outcomes"
    SHARED = "shared"  # memory that trainers on the same host see
    SCRATCH = "scratch"
    CHECKPOINTS = "checkpoints"  # copies that are being written or were read
