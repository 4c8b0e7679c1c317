"""The session stream over gRPC: raw frames in both directions, no protobuf in between."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
from kt_expert_proto.frame import EPOCH_METADATA_KEY, MEMBER_METADATA_KEY, SESSION_METHOD, FrameError, coalesce

from kt_expert_server.api.status import abort, abort_fault
from kt_expert_server.errors import InvalidRequest, ServerError, WrongPhase
from kt_expert_server.observe.metrics import Metrics
from kt_expert_server.runtime.compute import Compute
from kt_expert_server.runtime.registry import Registry
from kt_expert_server.runtime.run import Member
from kt_expert_server.runtime.session import Session

_log = logging.getLogger(__name__)
Context = grpc.aio.ServicerContext[bytes, bytes]
_METHOD = "Exchange"


class SessionStreams(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # generic in the stubs only
    """Serves /kt_expert.v1.Session/Exchange with identity serializers."""

    def __init__(self, registry: Registry, compute: Compute, metrics: Metrics) -> None:
        self._registry = registry
        self._compute = compute
        self._metrics = metrics

    def service(self, handler_call_details: Any) -> Any:
        if handler_call_details.method != SESSION_METHOD:
            return None
        return grpc.stream_stream_rpc_method_handler(self._exchange)

    async def _exchange(self, messages: AsyncIterator[bytes], context: Context) -> None:
        begun, code = time.monotonic(), "OK"
        self._metrics.call_started(_METHOD)
        try:
            await _Exchange(self._member(context), self._registry, self._compute, self._metrics).run(messages, context)
        except ServerError as error:
            code = error.code
            await abort(context, error)
        except asyncio.CancelledError:
            code = "CANCELLED"
            raise
        except Exception:  # the last place that can turn it into a status
            code = "INTERNAL"
            await abort_fault(context, _METHOD)
        finally:
            self._metrics.call_ended(_METHOD, code, time.monotonic() - begun)

    def _member(self, context: Context) -> Member:
        metadata = {str(key): str(value) for key, value in context.invocation_metadata() or ()}
        token, epoch = metadata.get(MEMBER_METADATA_KEY, ""), metadata.get(EPOCH_METADATA_KEY, "")
        if not token or not epoch.isdigit():
            raise InvalidRequest(f"the stream lacks metadata {MEMBER_METADATA_KEY} and {EPOCH_METADATA_KEY}; join a run first")
        member = self._registry.member(token)
        if int(epoch) != member.epoch:
            raise WrongPhase(f"epoch {epoch} is stale, rank {member.rank} is at {member.epoch}; join the run again")
        return member


class _Exchange:
    """One stream: a reader that feeds the session and a writer that drains what the session has to say."""

    def __init__(self, member: Member, registry: Registry, compute: Compute, metrics: Metrics) -> None:
        # Bounded by the member's credits: only outcomes that are not acknowledged wait here.
        self._outgoing: asyncio.Queue[list[bytes]] = asyncio.Queue()
        self._closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._session = Session(member, registry, compute, metrics, self._outgoing.put_nowait, self._close)

    def _close(self, error: ServerError) -> None:
        if not self._closed.done():
            self._closed.set_exception(error)

    async def run(self, messages: AsyncIterator[bytes], context: Context) -> None:
        self._session.attach()
        reader = asyncio.ensure_future(self._read(messages))
        writer = asyncio.ensure_future(self._write(context))
        ends = (self._closed, reader, writer)
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            for end in ends:
                if end.done():
                    await end
        finally:
            self._session.detach()
            for end in ends:
                end.cancel()
            await asyncio.gather(*ends, return_exceptions=True)

    async def _read(self, messages: AsyncIterator[bytes]) -> None:
        async for message in messages:
            try:
                self._session.receive(message)
            except FrameError as error:
                raise InvalidRequest(f"malformed frame: {error}") from error

    async def _write(self, context: Context) -> None:
        while True:
            for message in coalesce(await self._outgoing.get()):
                await context.write(message)
