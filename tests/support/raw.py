"""A member that speaks raw frames, so that a test can send what the client never would."""

from __future__ import annotations

import queue
import secrets
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
from kt_expert_proto.channel import SESSION_METHOD
from kt_expert_proto.codec import Decoder, Encoder, Memory, Outbound
from kt_expert_proto.dtypes import Dtype
from kt_expert_proto.header import FrameType, Header, Op, Tensor
from kt_expert_proto.lora import LayerLora
from kt_expert_proto.v1 import service_pb2 as pb
from kt_expert_proto.v1 import service_pb2_grpc
from kt_expert_proto.v1 import session_pb2 as spb

from support.adapters import ACTIVE, targets
from support.tokens import bearer

TIMEOUT_S = 30.0
HIDDEN, TOP_K, EXPERTS = 32, 2, 8  # of the tiny qwen3_moe
TOKENS = 3
LORA = LayerLora(0, rank_down=4, scale_down=1.0)
Frame = tuple[Header, bytes]


class _Bytes:
    """A received tensor."""

    def __init__(self, size: int) -> None:
        self.view = memoryview(bytearray(size))

    def release(self) -> None:
        pass


class _Collector:
    """Implements FrameReceiver."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []

    def admit(self, header: Header) -> _Bytes:
        return _Bytes(header.tensor_bytes)

    def deliver(self, header: Header, payload: bytes | _Bytes) -> None:
        self.frames.append((header, payload if isinstance(payload, bytes) else bytes(payload.view)))


class RawMember:
    """Opens a run and joins it, then sends whatever it is told to."""

    def __init__(
        self, address: str, run: str = "raw", *, world_size: int = 1, rank: int = 0, ephemeral: bool = True, join: bool = True,
        identity: str = "",
    ) -> None:  # fmt: skip
        self._metadata = bearer(identity) if identity else []
        self.channel = grpc.insecure_channel(
            address, options=(("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1))
        )
        self.stub = service_pb2_grpc.ExpertStub(self.channel)
        self.run, self.rank, self.ephemeral = run, rank, ephemeral
        lora = [LORA.to_proto()]
        self.config = pb.RunConfig(world_size=world_size, wire_dtype=pb.WIRE_DTYPE_FP32, lora=lora)
        self.hidden = HIDDEN
        self.instance = secrets.token_hex(16)
        self.epoch = 0
        self.next_id = 1
        self.acknowledged = 0
        self.joined = spb.Joined()
        self.call: Any = None
        self.open()
        if join:
            self.join()

    def open(self) -> None:
        """Opens a stream, and says nothing on it."""
        if self.call is not None and not self.call.is_active():
            self._outgoing.put(None)  # or the thread that sends on a stream that has ended waits for ever
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        exchange = self.channel.stream_stream(SESSION_METHOD, request_serializer=None, response_deserializer=None)
        self.call = exchange(iter(self._outgoing.get, None), timeout=TIMEOUT_S, metadata=self._metadata)
        self._encoder = Encoder()
        self._incoming = self._frames()

    def join(self, *, epoch: int | None = None, **fields: Any) -> spb.Joined:
        """Says JOIN, with fields of it replaced, and waits for JOINED."""
        self.epoch = self.epoch + 1 if epoch is None else epoch
        values: dict[str, Any] = {
            "run": self.run, "config": self.config, "ephemeral": self.ephemeral, "rank": self.rank, "instance": self.instance,
            "acknowledged": self.acknowledged, "born": self.joined.born,
        }  # fmt: skip
        self.send((Header(FrameType.JOIN, epoch=self.epoch), spb.Join(**values | fields).SerializeToString()))
        header, payload = next(self._incoming)
        assert header.type is FrameType.JOINED
        self.joined = spb.Joined.FromString(payload)
        return self.joined

    def rejoin(self, *, resume: bool, **fields: Any) -> None:
        """Joins the same rank again on a new stream, as the member it was or as another trainer that takes over."""
        if not resume:
            self.instance, self.epoch, self.acknowledged = secrets.token_hex(16), 0, 0
        self.open()
        self.join(takeover=not resume, **fields)

    def __enter__(self) -> RawMember:
        return self

    def __exit__(self, *_: object) -> None:
        self._outgoing.put(None)
        self.call.cancel()
        self.channel.close()

    def send(self, *frames: Outbound) -> None:
        for frame in frames:
            for message in self._encoder.messages([frame]):
                self.send_bytes(message)

    def send_bytes(self, message: bytes) -> None:
        self._outgoing.put(message)

    def encoded(self, *frames: Outbound) -> bytes:
        """What `send` would put on the wire."""
        return b"".join(self._encoder.messages(frames))

    def _frames(self) -> Iterator[Frame]:
        collector = _Collector()
        decoder: Decoder[_Bytes] = Decoder(collector)
        for message in self.call:
            decoder.feed(message)
            yield from collector.frames
            collector.frames.clear()

    def stream_error(self) -> grpc.RpcError:
        """The error that ended the stream."""
        try:
            for _ in self._incoming:
                pass
        except grpc.RpcError as error:
            return error
        raise AssertionError("the stream ended without an error")

    def header(self, kind: FrameType, request_id: int, **fields: Any) -> Header:
        values = {"layer": 0, "op": Op.FORWARD, "dtype": Dtype.FP32, "rows": TOKENS, "columns": self.hidden} | fields
        return Header(kind, request_id, epoch=self.epoch, **values)

    def forward_frames(
        self,
        request_id: int,
        *,
        ids: np.ndarray | None = None,
        weights: np.ndarray | None = None,
        top_k: int = TOP_K,
        save: bool = True,
        **fields: Any,
    ) -> list[Outbound]:
        """A forward of three tokens, with fields of its first header replaced."""
        ids = np.zeros((TOKENS, TOP_K), np.int32) if ids is None else ids
        weights = np.full((TOKENS, TOP_K), 0.5, np.float32) if weights is None else weights
        x = np.ones((TOKENS, self.hidden), np.float32)
        opened = spb.RequestOpen(forward=spb.Forward(top_k=top_k, save_for_backward=save, adapters=ACTIVE))
        return [
            (self.header(FrameType.REQUEST, request_id, **fields), opened.SerializeToString()),
            self.tensor(request_id, Tensor.EXPERT_IDS, Dtype.INT32, ids),
            self.tensor(request_id, Tensor.ROUTING_WEIGHTS, Dtype.FP32, weights),
            self.tensor(request_id, Tensor.HIDDEN_STATES, Dtype.FP32, x),
        ]

    def tensor(self, request_id: int, tensor: Tensor, dtype: Dtype, values: np.ndarray, op: Op = Op.FORWARD) -> Outbound:
        rows, columns = values.shape
        about = Header(FrameType.TENSOR, request_id, 0, op, tensor, dtype, rows, columns, epoch=self.epoch)
        return about, Memory(np.ascontiguousarray(values).data.cast("B") if values.size else memoryview(b""))

    def backward_frames(self, request_id: int, ticket: int, *, begin: bool = False, **fields: Any) -> list[Outbound]:
        dy = np.ones((fields.get("rows", TOKENS), self.hidden), np.float32)
        opened = spb.RequestOpen(backward=spb.Backward(ticket=ticket, targets=targets(LORA, replaced=begin)))
        return [
            (self.header(FrameType.REQUEST, request_id, **{"op": Op.BACKWARD, **fields}), opened.SerializeToString()),
            self.tensor(request_id, Tensor.GRAD_OUTPUT, Dtype.FP32, dy, Op.BACKWARD),
        ]

    def call_frames(self, op: Op, opened: spb.RequestOpen, request_id: int | None = None, **fields: Any) -> list[Outbound]:
        """A request without tensors."""
        header = self.header(FrameType.REQUEST, request_id or self.take_id(), **{"op": op, "rows": 0, "columns": 0, **fields})
        return [(header, opened.SerializeToString())]

    def outcome(self) -> list[Frame]:
        """The frames of the next outcome, which is not acknowledged."""
        frames: list[Frame] = []
        for header, payload in self._incoming:
            frames.append((header, payload))
            if header.type is FrameType.ERROR or len(frames) == 1 + _RESULT_TENSORS.get(header.op, 0):
                return frames
        raise AssertionError("the stream ended")

    def ask(self, frames: list[Outbound]) -> tuple[grpc.StatusCode, str]:
        """Sends one request and returns its outcome: OK, or the code and message of its ERROR frame. Acknowledges it."""
        self.send(*frames)
        frames_back = self.outcome()
        header, payload = frames_back[0]
        self.acknowledge(header.request_id)
        if header.type is FrameType.ERROR:
            detail = spb.ErrorDetail.FromString(payload)
            return next(code for code in grpc.StatusCode if code.value[0] == detail.code), detail.message
        self.head = spb.ResultHead.FromString(payload)
        return grpc.StatusCode.OK, ""

    def acknowledge(self, request_id: int) -> None:
        self.send((self.header(FrameType.ACK, request_id), b""))
        self.acknowledged = request_id

    def leave(self) -> None:
        assert self.ask(self.call_frames(Op.LEAVE, spb.RequestOpen(leave=spb.Leave())))[0] is grpc.StatusCode.OK

    def take_id(self) -> int:
        self.next_id += 1
        return self.next_id - 1


_RESULT_TENSORS = {Op.FORWARD: 1, Op.BACKWARD: 2, Op.READ_TENSOR: 1}
