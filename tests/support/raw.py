"""A member that speaks raw frames, so that a test can send what the client never would."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
from kt_expert_proto.frame import (
    EPOCH_METADATA_KEY,
    MEMBER_METADATA_KEY,
    SESSION_METHOD,
    Dtype,
    FrameType,
    Header,
    Op,
    Tensor,
    decode,
    encode,
    tensor_frames,
)
from kt_expert_proto.v1 import service_pb2 as pb
from kt_expert_proto.v1 import service_pb2_grpc
from kt_expert_proto.v1.session_pb2 import ErrorDetail, RequestOpen

TIMEOUT_S = 30.0
HIDDEN, TOP_K, EXPERTS = 32, 2, 8  # of the tiny qwen3_moe


class RawMember:
    """Opens and joins a run, then sends whatever it is told to."""

    def __init__(self, address: str, run: str = "raw", *, world_size: int = 1, rank: int = 0) -> None:
        self.channel = grpc.insecure_channel(
            address, options=(("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1))
        )
        self.stub = service_pb2_grpc.ExpertStub(self.channel)
        self.run, self.rank = run, rank
        lora = [pb.LayerLora(layer=0, rank_down=4, scale_down=1.0)]
        config = pb.RunConfig(world_size=world_size, wire_dtype=pb.WIRE_DTYPE_FP32, lora=lora)
        self.stub.OpenRun(pb.OpenRunRequest(run=run, config=config, ephemeral=True), timeout=TIMEOUT_S)
        self.joined = self.stub.JoinRun(pb.JoinRunRequest(run=run, rank=rank), timeout=TIMEOUT_S)
        self.next_id = int(self.joined.last_request_id) + 1
        self.attach()

    def attach(self, epoch: int | None = None) -> None:
        """Opens the stream, under another epoch where given."""
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        exchange = self.channel.stream_stream(SESSION_METHOD, request_serializer=None, response_deserializer=None)
        metadata = ((MEMBER_METADATA_KEY, self.joined.member), (EPOCH_METADATA_KEY, str(epoch or self.joined.epoch)))
        self.call: Any = exchange(iter(self._outgoing.get, None), metadata=metadata, timeout=TIMEOUT_S)
        self._incoming = self._frames()

    def rejoin(self, *, resume: bool) -> None:
        """Joins the same rank again, as the member it was or afresh, and opens a new stream."""
        token = self.joined.member if resume else ""
        request = pb.JoinRunRequest(run=self.run, rank=self.rank, resume_member=token)
        self.joined = self.stub.JoinRun(request, timeout=TIMEOUT_S)
        self.next_id = int(self.joined.last_request_id) + 1
        self.attach()

    def __enter__(self) -> RawMember:
        return self

    def __exit__(self, *_: object) -> None:
        self._outgoing.put(None)
        self.call.cancel()
        self.channel.close()

    def send(self, message: bytes) -> None:
        self._outgoing.put(message)

    def _frames(self) -> Iterator[tuple[Header, memoryview]]:
        for message in self.call:
            yield from decode(message)

    def stream_error(self) -> grpc.RpcError:
        """The error that ended the stream."""
        try:
            for _ in self._incoming:
                pass
        except grpc.RpcError as error:
            return error
        raise AssertionError("the stream ended without an error")

    def header(self, kind: FrameType, request_id: int, **fields: Any) -> Header:
        values = {"layer": 0, "op": Op.FORWARD, "dtype": Dtype.FP32, "tokens": 3, "hidden": HIDDEN} | fields
        return Header(kind, request_id, epoch=self.joined.epoch, **values)

    def forward_frames(
        self,
        request_id: int,
        *,
        ids: np.ndarray | None = None,
        weights: np.ndarray | None = None,
        top_k: int = TOP_K,
        save: bool = True,
        **fields: Any,
    ) -> list[bytes]:
        """A forward of three tokens, with fields of its OPEN header replaced."""
        tokens = 3
        ids = np.zeros((tokens, TOP_K), np.int32) if ids is None else ids
        weights = np.full((tokens, TOP_K), 0.5, np.float32) if weights is None else weights
        x = np.ones((tokens, HIDDEN), np.float32)
        opened = RequestOpen(top_k=top_k, save_for_backward=save, use_adapter=True)
        frames = [encode(self.header(FrameType.OPEN, request_id, **fields), opened.SerializeToString())]
        for tensor, dtype, values in (
            (Tensor.EXPERT_IDS, Dtype.INT32, ids),
            (Tensor.ROUTING_WEIGHTS, Dtype.FP32, weights),
            (Tensor.HIDDEN_STATES, Dtype.FP32, x),
        ):
            about = self.header(FrameType.DATA, request_id, tensor=tensor, dtype=dtype)
            frames += tensor_frames(about, values.data.cast("B"))
        return [*frames, encode(self.header(FrameType.END, request_id))]

    def backward_frames(self, request_id: int, ticket: int, **fields: Any) -> list[bytes]:
        dy = np.ones((fields.get("tokens", 3), HIDDEN), np.float32)
        fields = {"op": Op.BACKWARD, **fields}
        opened = RequestOpen(ticket=ticket)
        about = self.header(FrameType.DATA, request_id, **fields | {"tensor": Tensor.GRAD_OUTPUT})
        return [
            encode(self.header(FrameType.OPEN, request_id, **fields), opened.SerializeToString()),
            *tensor_frames(about, dy.data.cast("B")),
            encode(self.header(FrameType.END, request_id)),
        ]

    def ask(self, frames: list[bytes]) -> tuple[grpc.StatusCode, str]:
        """Sends one request and returns its outcome: OK, or the code and message of its ERROR frame. Acknowledges it."""
        for frame in frames:
            self.send(frame)
        for header, payload in self._incoming:
            if header.type is FrameType.ERROR:
                self.send(encode(self.header(FrameType.ACK, header.request_id)))
                detail = ErrorDetail.FromString(bytes(payload))
                return next(code for code in grpc.StatusCode if code.value[0] == detail.code), detail.message
            if header.type is FrameType.END:
                self.send(encode(self.header(FrameType.ACK, header.request_id)))
                return grpc.StatusCode.OK, ""
        raise AssertionError("the stream ended")

    def take_id(self) -> int:
        self.next_id += 1
        return self.next_id - 1
