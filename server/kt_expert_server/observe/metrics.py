"""Prometheus metrics of the server. Names follow prometheus.io/docs/practices/naming: base units, ``_total`` counters."""

from __future__ import annotations

import time

import prometheus_client
from kt_expert_proto.malloc import bytes_in_use
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from kt_expert_server.engine.budget import MemoryBudget
from kt_expert_server.engine.kinds import Kind
from kt_expert_server.engine.work import PASSES
from kt_expert_server.members.core import ServerCore, State

SECONDS_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
TOKEN_BUCKETS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)


class Metrics:
    """Implements Observer, and reads gauges from the core at scrape time."""

    def __init__(self, version: str, isa: str, weight_format: str) -> None:
        self.registry = CollectorRegistry()
        prometheus_client.disable_created_metrics()
        build = self._gauge("build_info", "Constant 1; what is running", ["version", "isa", "dtype"])
        build.labels(version, isa, weight_format).set(1)
        self._state = self._gauge("state", "1 for the state the server is in", ["state"])
        self._tokens = self._counter("tokens", "Tokens computed", ["pass"])
        self._flops = self._counter("gemm_flops", "Floating-point operations of the expert products", ["isa", "dtype"])
        self._stage = self._histogram("stage_seconds", "Time of a request by stage", ["pass", "stage"], SECONDS_BUCKETS)
        self._batch = self._histogram("batch_tokens", "Tokens of a request", ["pass"], TOKEN_BUCKETS)
        self._engine_stages = self._counter("engine_stage_seconds", "Time of the engine by what it did", ["pass", "stage"])
        self._shared_batches = self._counter("shared_batches", "Batches that shared one pass over the weights", ["pass"])
        self._fast_forwards = self._counter("fast_forwards", "Small forwards that passed the scheduler by", ["outcome"])
        self._fast_seconds = self._counter("fast_forward_seconds", "Time of the engine for them", [])
        self._imbalance = self._gauge("load_imbalance_ratio", "Most tokens of an expert over the mean", ["layer"])
        self._queue_depth = self._gauge("queue_depth", "Operations waiting for the engine or running", [])
        self._inflight = self._gauge("inflight_requests", "Requests accepted and without an outcome", [])
        self._inflight_bytes = self._gauge("inflight_bytes", "Tensors of those requests", [])
        self._rejected = self._counter("rejected", "Requests that ended in an error, by status code", ["reason"])
        self._duplicates = self._counter("duplicate_requests", "Requests sent again and answered from memory", [])
        self._paced = self._counter(
            "paced_calls", "Calls that came faster than --calls-per-second: they waited or were refused", []
        )
        self._memory = self._gauge("memory_bytes", "Memory reserved", ["kind"])
        self._limit = self._gauge("memory_budget_bytes", "The limit all reservations share", [])
        self._heap: Gauge | None = None  # where the C library says it
        if bytes_in_use() is not None:
            self._heap = self._gauge("heap_bytes", "What the process has taken from malloc and not given back", [])
        self._runs = self._gauge("run_active", "Runs that are open", [])
        self._sessions = self._gauge("session_active", "Members with an attached stream", [])
        self._tickets = self._gauge("tickets", "Tickets that wait for their backward", [])
        self._steps = self._histogram("optimizer_step_seconds", "Time of an optimizer step", [], SECONDS_BUCKETS)
        self._checkpoints = self._histogram("checkpoint_seconds", "Time of a checkpoint", ["op"], SECONDS_BUCKETS)
        self._last_checkpoint = self._gauge(
            "checkpoint_last_success_timestamp_seconds", "When a checkpoint last succeeded", ["op"]
        )
        self._threads = self._gauge("threads", "Threads of the engine", [])
        self._misplaced = self._gauge("misplaced_layers", "Layers whose memory is not on the nodes it was asked for", [])
        self._started = Counter("grpc_server_started", "Calls begun", ["grpc_method"], registry=self.registry)
        self._handled = Counter(
            "grpc_server_handled", "Calls ended, by status code", ["grpc_method", "grpc_code"], registry=self.registry
        )
        self._handling = Histogram(
            "grpc_server_handling_seconds", "Time of a call", ["grpc_method"], buckets=SECONDS_BUCKETS,
            registry=self.registry,
        )  # fmt: skip
        # Series of passes exist from the start, so that rates begin at zero, and are found without a look-up in the library.
        self._stages = {
            (direction, stage): self._stage.labels(direction, stage)
            for direction in PASSES
            for stage in ("receive", "queue", "compute", "send")
        }
        self._passes = {each: (self._tokens.labels(each), self._batch.labels(each)) for each in PASSES}
        self._stages_of_engine: dict[tuple[str, str], Counter] = {}
        self._fast = {each: self._fast_forwards.labels(each) for each in ("done", "busy")}
        self._shared = {each: self._shared_batches.labels(each) for each in PASSES}
        self._all_flops = self._flops.labels(isa, weight_format)
        prometheus_client.ProcessCollector(registry=self.registry)

    def _gauge(self, name: str, text: str, labels: list[str]) -> Gauge:
        return Gauge(f"kt_expert_{name}", text, labels, registry=self.registry)

    def _counter(self, name: str, text: str, labels: list[str]) -> Counter:
        return Counter(f"kt_expert_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, labels: list[str], buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"kt_expert_{name}", text, labels, buckets=buckets, registry=self.registry)

    def stage(self, direction: str, stage: str, seconds: float) -> None:
        self._stages[direction, stage].observe(seconds)

    def computed(self, direction: str, tokens: int, flops: float) -> None:
        counted, sizes = self._passes[direction]
        counted.inc(tokens)
        sizes.observe(tokens)
        self._all_flops.inc(flops)

    def engine_stage(self, direction: str, stage: str, seconds: float) -> None:
        found = self._stages_of_engine.get((direction, stage))
        if found is None:
            found = self._stages_of_engine[direction, stage] = self._engine_stages.labels(direction, stage)
        found.inc(seconds)

    def shared(self, direction: str, batches: int) -> None:
        self._shared[direction].inc(batches)

    def fast(self, forwards: int, busy: int, tokens: int, flops: float, seconds: float) -> None:
        self._fast["done"].inc(forwards)
        self._fast["busy"].inc(busy)
        self._fast_seconds.inc(seconds)
        self._passes["forward"][0].inc(tokens)
        self._all_flops.inc(flops)

    def imbalance(self, layer: int, ratio: float) -> None:
        self._imbalance.labels(str(layer)).set(ratio)

    def rejected(self, reason: str) -> None:
        self._rejected.labels(reason).inc()

    def duplicate(self) -> None:
        self._duplicates.inc()

    def paced(self) -> None:
        self._paced.inc()

    def step(self, seconds: float) -> None:
        self._steps.observe(seconds)

    def checkpoint(self, operation: str, seconds: float) -> None:
        self._checkpoints.labels(operation).observe(seconds)
        self._last_checkpoint.labels(operation).set(time.time())

    def call_started(self, method: str) -> None:
        self._started.labels(method).inc()

    def call_ended(self, method: str, code: str, seconds: float) -> None:
        self._handled.labels(method, code).inc()
        self._handling.labels(method).observe(seconds)

    def render(self, core: ServerCore, budget: MemoryBudget, threads: int) -> bytes:
        """The text exposition, with the gauges read now."""
        core.report_fast()
        for state in State:
            self._state.labels(state.value).set(1 if core.state is state else 0)
        members = core.runs.members
        self._queue_depth.set(core.dispatch.depth)
        waiting = [entry for member in members for entry in member.log if entry.outcome is None]
        self._inflight.set(len(waiting))
        self._inflight_bytes.set(sum(entry.credit_bytes or 0 for entry in waiting))
        for kind in Kind:
            self._memory.labels(kind.value).set(budget.reserved(kind))
        self._limit.set(budget.limit_bytes)
        if self._heap is not None:
            self._heap.set(bytes_in_use() or 0)
        self._runs.set(len(core.runs.by_name))
        self._sessions.set(sum(member.stream is not None for member in members))
        self._tickets.set(sum(len(member.tickets) for member in members))
        self._threads.set(threads)
        layers = core.model.layers.values() if core.model is not None else ()
        self._misplaced.set(sum(bool(layer.weights.placement_obstacle) for layer in layers))
        return prometheus_client.generate_latest(self.registry)
