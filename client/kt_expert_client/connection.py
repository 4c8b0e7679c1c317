"""Connecting to a server and opening runs on it."""

from __future__ import annotations

import os
import secrets
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import grpc
from kt_expert_proto.dtypes import TOKEN_DTYPES
from kt_expert_proto.environment import unknown_variable
from kt_expert_proto.header import PROTOCOL_VERSION
from kt_expert_proto.lora import LayerLora
from kt_expert_proto.v1 import service_pb2 as pb
from kt_expert_proto.v1 import service_pb2_grpc

from kt_expert_client.address import ServerAddress, is_refused
from kt_expert_client.credentials import Credentials, open_channel
from kt_expert_client.errors import DeadlineExceeded, InvalidRequest, KtExpertError, OutOfCapacity, ServerUnavailable, from_rpc
from kt_expert_client.options import RunOptions
from kt_expert_client.profile.environment import measure_as_asked
from kt_expert_client.profile.metrics import CallMetrics
from kt_expert_client.profile.recorder import Recorder
from kt_expert_client.run import Run, memory_of
from kt_expert_client.session.actions import JoinTerms
from kt_expert_client.session.core import SessionCore
from kt_expert_client.session.driver import Session
from kt_expert_client.session.journal import Journal
from kt_expert_client.staging import Staging
from kt_expert_client.wire.choice import Transports
from kt_expert_client.wire.grpc_stream import Metadata

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

DEFAULT_CONNECT_TIMEOUT_S = 60.0
DEFAULT_OPEN_TIMEOUT_S = 120.0  # a rank whose trainer crashed is free when its lease is over
_CALL_TIMEOUT_S = 60.0
_LOADING_POLL_S = 0.5
_REFUSED_PATIENCE_S = 5.0  # a server that was started together with its trainers is there by then
_INSTANCE_BYTES = 16
_WIRE_DTYPES = {"bf16": pb.WIRE_DTYPE_BF16, "fp32": pb.WIRE_DTYPE_FP32}


class Client:
    """A connection to one server. Close it, or use it as a context manager."""

    def __init__(
        self, address: str, channel: grpc.Channel, metadata: Metadata, hello: pb.HelloResponse, transports: Transports
    ) -> None:  # fmt: skip
        self.address = address
        self._metadata = metadata
        self.model_type: str = hello.model_type
        self.model_digest: str = hello.model_digest
        self.isa: str = hello.isa
        self.layers: dict[int, pb.LayerSpec] = {spec.layer: spec for spec in hello.layers}
        self._channel = channel
        self._stub = service_pb2_grpc.ExpertStub(channel)
        self._transports = transports
        self.recorder = Recorder()
        self._report = measure_as_asked(self.recorder, os.environ)
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
        takeover: bool = False,
        timeout_s: float = DEFAULT_OPEN_TIMEOUT_S,
    ) -> Run:
        """Creates or attaches to a run and joins it as `rank`.

        Without a name the run is anonymous and ends with its members; a named run stays on the server. options.dropout goes
        for layers whose entry names none. Waits, up to `timeout_s`, for a rank whose last trainer lost its connection, and
        for memory that will be free. Raises InvalidRequest; AlreadyExists for another configuration under that name, or for
        a rank that a trainer holds, unless `takeover`; OutOfCapacity where it does not fit.
        """
        if wire_dtype not in TOKEN_DTYPES:
            raise InvalidRequest(f"wire_dtype is {wire_dtype!r}, expected one of {sorted(TOKEN_DTYPES)}")
        if name is None and world_size > 1:
            raise InvalidRequest("a run of several members needs a name that all of them give")
        options = options or RunOptions()
        keep = name is not None if ephemeral is None else not ephemeral
        terms = JoinTerms(
            name or f"anonymous-{uuid.uuid4().hex}",
            _run_config(world_size, wire_dtype, lora, seed, options),
            not keep,
            rank,
            secrets.token_hex(_INSTANCE_BYTES),
            takeover,
        )
        staging, journal = Staging(), Journal(options.replay_bytes)
        core = SessionCore(terms, journal, memory_of(staging), time.monotonic(), timeout_s)
        session = Session(core, self._transports, f"{terms.run}-{rank}")
        session.start(timeout_s)
        top_k = {layer: spec.top_k for layer, spec in self.layers.items()}
        run = Run(session, staging, terms, wire_dtype, top_k, self._runs.discard, self.recorder)
        self._runs.add(run)
        return run

    @property
    def transport(self) -> str:
        """What the tensors of its runs travel through: "same-host", "tcp" or "stream"."""
        return self._transports.name

    def close_run(self, name: str) -> None:
        """Ends a run, whoever is in it, and gives its memory back; its checkpoints stay. Raises NotFound."""
        self._call("close_run", self._stub.CloseRun, pb.CloseRunRequest(run=name))

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
        if self._report is not None:
            self._report.say()

    def export_metrics(self, registry: CollectorRegistry | None = None) -> None:
        """From now on, the times of calls are kt_expert_client_* in that registry of prometheus-client, or in its default one.
        Raises InvalidRequest where that is not installed."""
        self.recorder.listen(CallMetrics(registry))

    def _call(self, what: str, method: Callable[..., Any], request: object) -> Any:
        try:
            return method(request, timeout=_CALL_TIMEOUT_S, metadata=self._metadata)
        except grpc.RpcError as error:
            raise from_rpc(error, what) from error


def _run_config(world_size: int, wire_dtype: str, lora: Iterable[LayerLora], seed: int, options: RunOptions) -> pb.RunConfig:
    entries = [entry if entry.dropout or not options.dropout else replace(entry, dropout=options.dropout) for entry in lora]
    return pb.RunConfig(
        world_size=world_size,
        wire_dtype=_WIRE_DTYPES[wire_dtype],
        lora=[entry.to_proto() for entry in entries],
        seed=seed,
        moment_dtype=options.moment_dtype,
        tickets=options.ticket_policy,
    )


def connect(
    address: str,
    *,
    timeout_s: float = DEFAULT_CONNECT_TIMEOUT_S,
    credentials: Credentials | None = None,
    transport: str | None = None,
) -> Client:
    """Connects to host:port, [IPv6]:port, grpcs://host:port or unix:/path, and waits until the server has loaded its model.

    `credentials` default to those the environment names (Credentials.from_environment). `transport` of tensors: "same-host"
    shares memory with a server on this host, "tcp" sends them to its data port, "stream" over gRPC, "auto" takes the first of
    these that is possible; by default what KT_EXPERT_TRANSPORT says, or "auto". Raises InvalidRequest for an address, a
    transport or a variable that makes no sense, ServerUnavailable where nothing answers or the model is not loaded within
    `timeout_s`, NotAuthenticated, and WrongPhase for another protocol version.
    """
    unknown = unknown_variable(os.environ)
    if unknown is not None:
        raise InvalidRequest(unknown)
    parsed = ServerAddress.parse(address)
    credentials = credentials or Credentials.from_environment()
    channel, metadata = open_channel(parsed, credentials)
    deadline = time.monotonic() + timeout_s
    try:
        transports = Transports(channel, metadata, transport, parsed, credentials)
        hello = _wait_until_loaded(parsed, channel, metadata, deadline, timeout_s)
        return Client(address, channel, metadata, hello, transports)
    except BaseException:
        channel.close()
        raise


def _wait_until_loaded(
    address: ServerAddress, channel: grpc.Channel, metadata: Metadata, deadline: float, timeout_s: float
) -> pb.HelloResponse:
    stub = service_pb2_grpc.ExpertStub(channel)
    request = pb.HelloRequest(protocol_version=PROTOCOL_VERSION, client_version=version("kt-expert"))
    refused_until = time.monotonic() + min(timeout_s, _REFUSED_PATIENCE_S)
    while True:
        pause_s = _LOADING_POLL_S
        try:
            hello: pb.HelloResponse = stub.Hello(
                request, timeout=max(0.01, min(_CALL_TIMEOUT_S, deadline - time.monotonic())), metadata=metadata
            )
        except grpc.RpcError as error:
            told = from_rpc(error, f"no kt-expert-server answered at {address.text}")
            pause_s = max(pause_s, told.retry_delay_s)
            failure = _why_no_answer(address, told, refused_until, final=time.monotonic() + pause_s >= deadline)
            if failure is not None:
                raise failure from error
        else:
            if hello.state != pb.SERVER_STATE_LOADING:
                return hello
            if deadline - time.monotonic() < _LOADING_POLL_S:
                raise ServerUnavailable(
                    f"the server at {address.text} is still loading its model ({100 * hello.load_progress:.0f} %) after "
                    f"{timeout_s:g} s"
                )
        time.sleep(pause_s)


def _why_no_answer(
    address: ServerAddress, failure: KtExpertError, refused_until: float, *, final: bool
) -> KtExpertError | None:  # fmt: skip
    """What to raise; None where the server may still come, or has said when to ask again."""
    if isinstance(failure, OutOfCapacity) and failure.retry_delay_s and not final:
        return None
    if failure.is_answer or not isinstance(failure, ServerUnavailable | DeadlineExceeded):
        return failure
    address.find()
    if is_refused(address) and (final or time.monotonic() >= refused_until):
        return ServerUnavailable(f"nothing listens at {address.text}: the connection is refused; is the server started there?")
    details = address.describe_failure(str(failure))
    return ServerUnavailable(details) if final or details != str(failure) else None
