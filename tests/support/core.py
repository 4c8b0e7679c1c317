"""The server's core with its store, event by event: for what happens between two events."""

from __future__ import annotations

import random
from collections import deque
from typing import Any, Protocol

import kt_expert_native as native
import numpy as np
from kt_expert_proto.dtypes import Dtype
from kt_expert_proto.header import FrameType, Header, Op, Tensor
from kt_expert_proto.lora import DEFAULT_ADAPTER, LayerLora
from kt_expert_proto.v1 import service_pb2 as pb
from kt_expert_proto.v1 import session_pb2 as spb
from kt_expert_server.checkpoints.store import CheckpointStore
from kt_expert_server.engine.budget import MemoryBudget
from kt_expert_server.engine.buffers import BufferPool, PooledBuffer
from kt_expert_server.engine.fast_path import FastForwards
from kt_expert_server.engine.passes import Tools
from kt_expert_server.engine.quotas import Quotas
from kt_expert_server.errors import ServerError
from kt_expert_server.members.actions import EndStream, Note, Send, StartDisk, StartWork
from kt_expert_server.members.core import ServerCore
from kt_expert_server.members.limits import Limits
from kt_expert_server.observe.observer import NullObserver
from simulation.disk import SimulatedDisk
from simulation.model import HIDDEN, LAYERS, TOKENS, TOP_K, base_model, batch

from support.adapters import ACTIVE, adamw, targets

LORA = [LayerLora(layer, False, 2, 2, 2, 1.0, 1.0, 1.0) for layer in range(LAYERS)]

CREATED = "a" * 32


class CoreServer:
    """Engine and disk do their work when they are told to, or at once."""

    def __init__(self, limits: Limits | None = None, budget_bytes: int = 1 << 26, disk: SimulatedDisk | None = None) -> None:
        self.disk = disk or SimulatedDisk(random.Random(0))  # noqa: S311  # which bytes a crash keeps
        self.store = CheckpointStore(self.disk)
        self.store.prepare()
        limits = limits or Limits()
        self.budget = MemoryBudget(budget_bytes, quotas=Quotas(limits.quotas))
        tools = Tools(native.Engine(1), self.budget, BufferPool(0), NullObserver())
        self.core = ServerCore(tools, limits, self.store)
        self.core.become_ready(base_model())
        self.now = 0.0
        self.works: deque[StartWork] = deque()
        self.jobs: deque[StartDisk] = deque()
        self.notes: list[str] = []
        self.members: dict[int, Heard] = {}  # by stream
        self.holds_disk = self.holds_engine = False

    def carry_out(self) -> None:
        """All actions, and what follows from them."""
        while True:
            for action in self.core.take_actions():
                match action:
                    case Send():
                        content = action.payload if isinstance(action.payload, bytes) else bytes(action.payload.view)
                        self.members[action.stream].frames.append((action.header, content))
                    case EndStream():
                        self.members[action.stream].ended = action.error
                    case StartWork():
                        self.works.append(action)
                    case StartDisk():
                        self.jobs.append(action)
                    case Note():
                        self.notes.append(action.text)
                    case _:
                        pass
            if self.works and not self.holds_engine:
                self._work(self.works.popleft())
            elif self.jobs and not self.holds_disk:
                self._job(self.jobs.popleft())
            else:
                return

    def work_once(self) -> bool:
        """One piece of the engine's work that is held back. False where there is none."""
        if self.works:
            self._work(self.works.popleft())
            self.carry_out()
            return True
        return False

    def write_once(self) -> bool:
        """One job of the disk that is held back. False where there is none."""
        if self.jobs:
            self._job(self.jobs.popleft())
            self.carry_out()
            return True
        return False

    def tick(self, now: float) -> None:
        self.now = now
        self.core.tick(now)
        self.carry_out()

    def _work(self, action: StartWork) -> None:
        error = None
        try:
            action.work.run_part(action.part)
        except Exception as caught:
            error = caught
        self.core.work_done(error, self.now)

    def _job(self, action: StartDisk) -> None:
        result, error = None, None
        try:
            result = action.job()
        except ServerError as caught:
            error = caught
        self.core.disk_done(action.job_id, result, error, self.now)


def run_config(world_size: int = 1) -> pb.RunConfig:
    lora = [each.to_proto() for each in LORA]
    return pb.RunConfig(world_size=world_size, wire_dtype=pb.WIRE_DTYPE_FP32, lora=lora, seed=1)


class Heard(Protocol):
    """What a stream has been sent."""

    frames: list[tuple[Header, bytes]]
    ended: ServerError | None


class CoreMember:
    """One stream that has joined a run, and says what it is told to."""

    def __init__(
        self, server: CoreServer, run: str = "run", *, rank: int = 0, world_size: int = 1, identity: str = "",
        instance: str = CREATED, ephemeral: bool = False, epoch: int = 1, fast: FastForwards | None = None, **join: Any,
    ) -> None:  # fmt: skip
        self.server, self.epoch, self.next_id = server, epoch, 1
        self.frames: list[tuple[Header, bytes]] = []
        self.ended: ServerError | None = None
        self.stream = 1 + max(server.members, default=0)
        server.members[self.stream] = self
        server.core.stream_opened(self.stream, identity, server.now, fast=fast)
        joins = spb.Join(run=run, config=run_config(world_size), rank=rank, instance=instance, ephemeral=ephemeral, **join)
        self._receive(Header(FrameType.JOIN, epoch=epoch), joins.SerializeToString())
        server.carry_out()

    @property
    def joined(self) -> spb.Joined:
        (joined,) = [spb.Joined.FromString(content) for header, content in self.frames if header.type is FrameType.JOINED]
        return joined

    def ask(self, op: Op, **fields: Any) -> int:
        """A request without tensors. Returns its id; carry_out() does the rest."""
        request_id, self.next_id = self.next_id, self.next_id + 1
        header = Header(FrameType.REQUEST, request_id, 0, op, deadline_ms=60_000, epoch=self.epoch)
        self._receive(header, spb.RequestOpen(**fields).SerializeToString())
        return request_id

    def call(self, op: Op, **fields: Any) -> str:
        """As ask(), and its outcome, which is acknowledged: "" or the error's text."""
        request_id = self.ask(op, **fields)
        self.server.carry_out()
        return self.take(request_id)

    def forward(
        self, tokens: int = TOKENS, layer: int = 0, expert_ids: int | None = None, of: int = 0, *, save: bool = True
    ) -> int:  # fmt: skip
        """Batch number `of`, all routes to one expert where it is given. Returns the request's id, which is the ticket."""
        x, ids, weights = _batch(tokens, of)
        if expert_ids is not None:
            ids = np.full_like(ids, expert_ids)
        opened = spb.RequestOpen(forward=spb.Forward(top_k=TOP_K, save_for_backward=save, adapters=ACTIVE))
        return self._pass(Op.FORWARD, opened, [
            (Tensor.EXPERT_IDS, Dtype.INT32, ids),
            (Tensor.ROUTING_WEIGHTS, Dtype.FP32, weights),
            (Tensor.HIDDEN_STATES, Dtype.FP32, x),
        ], layer)  # fmt: skip

    def backward(self, ticket: int, tokens: int = TOKENS) -> int:
        """Of layer 0."""
        opened = spb.RequestOpen(backward=spb.Backward(ticket=ticket, targets=targets(LORA[0])))
        return self._pass(Op.BACKWARD, opened, [(Tensor.GRAD_OUTPUT, Dtype.FP32, _batch(tokens)[0])])

    def write(self, tensor: str, values: np.ndarray) -> int:
        """A parameter of the default adapter in layer 0, [E * rows, columns]."""
        name = spb.TensorName(adapter=DEFAULT_ADAPTER, tensor=tensor, part=pb.ADAPTER_PART_PARAMETER)
        opened = spb.RequestOpen(write_tensor=name)
        return self._pass(Op.WRITE_TENSOR, opened, [(Tensor.ADAPTER, Dtype.FP32, values)], columns=values.shape[1])

    def cancel(self, request_id: int) -> None:
        self._receive(Header(FrameType.CANCEL, request_id, epoch=self.epoch), b"")
        self.server.carry_out()

    def train(self, tokens: int = TOKENS) -> str:
        """A forward and a backward of layer 0. Returns the first error's text."""
        ticket = self.forward(tokens)
        error = self.take(ticket)
        if error:
            return error
        return self.take(self.backward(ticket, tokens))

    def ask_step(self, index: int) -> int:
        update = adamw(0.01)
        request_id = self.ask(Op.STEP, step=spb.Step(step=index, groups=[update]))
        self.server.carry_out()
        return request_id

    def has_outcome(self, request_id: int) -> bool:
        return any(header.request_id == request_id for header, _ in self.frames)

    def has_error(self, request_id: int) -> bool:
        return any(header.request_id == request_id and header.type is FrameType.ERROR for header, _ in self.frames)

    def take(self, request_id: int) -> str:
        """The outcome of a request whose outcome is here, which is acknowledged."""
        header, content = next(frame for frame in self.frames if frame[0].request_id == request_id)
        self._receive(Header(FrameType.ACK, request_id, epoch=self.epoch), b"")
        self.server.carry_out()
        return spb.ErrorDetail.FromString(content).message if header.type is FrameType.ERROR else ""

    def close(self) -> None:
        self.server.core.stream_closed(self.stream, self.server.now)
        self.server.carry_out()

    def _pass(
        self, op: Op, opened: spb.RequestOpen, tensors: list[tuple[Tensor, Dtype, np.ndarray]], layer: int = 0,
        columns: int = HIDDEN,
    ) -> int:  # fmt: skip
        request_id, self.next_id = self.next_id, self.next_id + 1
        rows = tensors[-1][2].shape[0]
        header = Header(FrameType.REQUEST, request_id, layer, op, Tensor.NONE, Dtype.FP32, rows, columns, 60_000, self.epoch)
        self._receive(header, opened.SerializeToString())
        for tensor, dtype, values in tensors:
            about = Header(FrameType.TENSOR, request_id, layer, op, tensor, dtype, *values.shape, epoch=self.epoch)
            buffer = self.server.core.admit(self.stream, about, self.server.now)
            if buffer is not None:
                buffer.view[:] = np.ascontiguousarray(values).data.cast("B")
                self._receive(about, buffer)
        self.server.carry_out()
        return request_id

    def _receive(self, header: Header, payload: bytes | PooledBuffer) -> None:
        self.server.core.received(self.stream, header, payload, self.server.now)


def _batch(tokens: int, of: int = 0) -> list[np.ndarray]:
    """x, expert ids and routing weights."""
    return [np.repeat(each, tokens // TOKENS, axis=0) for each in batch(of, 0, 0, 0)]
