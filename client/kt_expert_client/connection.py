"""Connecting to a server and opening runs on it."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterable
from importlib.metadata import version
from typing import Any

import grpc
from kt_expert_proto.frame import MAX_MESSAGE_BYTES, PROTOCOL_VERSION
from kt_expert_proto.v1 import service_pb2 as pb
from kt_expert_proto.v1 import service_pb2_grpc

from kt_expert_client.adapter import LayerLora
from kt_expert_client.errors import DeadlineExceeded, InvalidRequest, ServerUnavailable, from_rpc
from kt_expert_client.options import RunOptions
from kt_expert_client.run import Run
from kt_expert_client.session import Credits, Session
from kt_expert_client.staging import WIRE_TORCH_DTYPES
from kt_expert_client.transport.grpc_stream import GrpcStreamTransport

DEFAULT_CONNECT_TIMEOUT_S = 60.0
_CALL_TIMEOUT_S = 60.0
_LOADING_POLL_S = 0.5
_PROTO_DTYPES = {"bf16": pb.WIRE_DTYPE_BF16, "fp32": pb.WIRE_DTYPE_FP32}
_OPTIONS = (
    ("grpc.max_receive_message_length", 8 * MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", 8 * MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.enable_retries", 0),  # a repeated backward must be recognised by its id, not sent by the library
    ("grpc.use_local_subchannel_pool", 1),
)


class Client:
    """A connection to one server. Close it, or use it as a context manager."""

    def __init__(self, address: str, channel: grpc.Channel, hello: pb.HelloResponse) -> None:
        self.address = address
        self.model_type: str = hello.model_type
        self.model_digest: str = hello.model_digest
        self.isa: str = hello.isa
        self.layers: dict[int, pb.LayerSpec] = {spec.layer: spec for spec in hello.layers}
        self._channel = channel
        self._stub = service_pb2_grpc.ExpertStub(channel)
        self._runs: set[Run] = set()
        self._names: dict[str, int] = {}
        self._pid = os.getpid()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open_run(
        self,
        name: str | None = None,
        *,
        lora: Iterable[LayerLora] = (),
        rank: int = 0,
        world_size: int = 1,
        wire_dtype: str = "bf16",
        seed: int = 0,
        ephemeral: bool | None = None,
        options: RunOptions | None = None,
    ) -> Run:
        """Creates or attaches to a run and joins it as `rank`.

        Without a name the run is anonymous and ends with its members; a named run stays on the server. Raises
        InvalidRequest, AlreadyExists for another configuration under that name, OutOfCapacity where it does not fit.
        """
        if wire_dtype not in WIRE_TORCH_DTYPES:
            raise InvalidRequest(f"wire_dtype is {wire_dtype!r}, expected one of {sorted(WIRE_TORCH_DTYPES)}")
        if name is None and world_size > 1:
            raise InvalidRequest("a run of several members needs a name that all of them give")
        config = _run_config(world_size, wire_dtype, lora, seed, options or RunOptions())
        run_name = name or f"anonymous-{uuid.uuid4().hex}"
        keep = name is not None if ephemeral is None else not ephemeral
        self._call("open_run", self._stub.OpenRun, pb.OpenRunRequest(run=run_name, config=config, ephemeral=not keep))
        joined = self._call("join_run", self._stub.JoinRun, pb.JoinRunRequest(run=run_name, rank=rank))
        transport = GrpcStreamTransport(self._channel, joined.member, joined.epoch)
        session = Session(
            transport, joined.epoch, Credits(joined.credit_requests, joined.credit_bytes), int(joined.last_request_id)
        )
        run = Run(
            self._stub,
            session,
            run_name,
            joined,
            wire_dtype,
            {layer: spec.top_k for layer, spec in self.layers.items()},
            self._runs.discard,
        )
        self._runs.add(run)
        return run

    def unique_run_name(self, name: str) -> str:
        """`name` for the first run of this process that asks for it, name-2, name-3, ... for further ones."""
        self._names[name] = self._names.get(name, 0) + 1
        return name if self._names[name] == 1 else f"{name}-{self._names[name]}"

    def status(self) -> pb.GetStatusResponse:
        status: pb.GetStatusResponse = self._call("status", self._stub.GetStatus, pb.GetStatusRequest())
        return status

    def close(self) -> None:
        """Leaves all runs and closes the channel. Does nothing in a forked child: the connection is its parent's."""
        if os.getpid() != self._pid:
            return
        for run in list(self._runs):
            run.leave()
        self._runs.clear()
        self._channel.close()

    def _call(self, what: str, method: Callable[..., Any], request: object) -> Any:
        try:
            return method(request, timeout=_CALL_TIMEOUT_S)
        except grpc.RpcError as error:
            raise from_rpc(error, what) from error


def _run_config(world_size: int, wire_dtype: str, lora: Iterable[LayerLora], seed: int, options: RunOptions) -> pb.RunConfig:
    return pb.RunConfig(
        world_size=world_size,
        wire_dtype=_PROTO_DTYPES[wire_dtype],
        lora=[entry.to_proto() for entry in lora],
        seed=seed,
        moment_dtype=options.moment_dtype,
        tickets=options.ticket_policy,
    )


def connect(address: str, *, timeout_s: float = DEFAULT_CONNECT_TIMEOUT_S) -> Client:
    """Connects to host:port and waits until the server has loaded its model.

    Raises ServerUnavailable where nothing answers or the model is not loaded within `timeout_s`, WrongPhase for another
    protocol version.
    """
    channel = grpc.insecure_channel(address, options=_OPTIONS)
    deadline = time.monotonic() + timeout_s
    try:
        return Client(address, channel, _wait_until_loaded(address, channel, deadline, timeout_s))
    except BaseException:
        channel.close()
        raise


def _wait_until_loaded(address: str, channel: grpc.Channel, deadline: float, timeout_s: float) -> pb.HelloResponse:
    stub = service_pb2_grpc.ExpertStub(channel)
    request = pb.HelloRequest(protocol_version=PROTOCOL_VERSION, client_version=version("kt-expert"))
    while True:
        left = deadline - time.monotonic()
        try:
            hello: pb.HelloResponse = stub.Hello(request, timeout=max(0.01, left), wait_for_ready=True)
        except grpc.RpcError as error:
            failure = from_rpc(error, f"no kt-expert-server answered at {address} within {timeout_s:g} s")
            if isinstance(failure, DeadlineExceeded):
                raise ServerUnavailable(str(failure)) from error
            raise failure from error
        if hello.state != pb.SERVER_STATE_LOADING:
            return hello
        if deadline - time.monotonic() < _LOADING_POLL_S:
            raise ServerUnavailable(
                f"the server at {address} is still loading its model ({100 * hello.load_progress:.0f} %) after {timeout_s:g} s"
            )
        time.sleep(_LOADING_POLL_S)
