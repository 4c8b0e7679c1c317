"""Requests that cannot be parsed are their sender's error: gRPC would call them unknown and log a traceback for each."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError

from kt_expert_server.edge.pace import STRANGERS, Pace
from kt_expert_server.edge.status import abort
from kt_expert_server.errors import InvalidRequest, OutOfCapacity

Context = grpc.aio.ServicerContext[Any, Any]
Check = Callable[[Any, Context], Awaitable[Any]]
# Name of a handler's behaviour, by whether requests and responses are streams.
_BEHAVIOURS = {
    (False, False): "unary_unary",
    (False, True): "unary_stream",
    (True, False): "stream_unary",
    (True, True): "stream_stream",
}


class _Malformed:
    """In place of a message."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


class Parsing(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs only
    """Answers malformed requests of every service with INVALID_ARGUMENT, at the pace of strangers."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_deserializer is None:
            return handler
        name = _BEHAVIOURS[handler.request_streaming, handler.response_streaming]
        behaviour = _behind(self._each if handler.request_streaming else self._one, getattr(handler, name))
        return handler._replace(**{"request_deserializer": _safe(handler.request_deserializer), name: behaviour})

    async def _one(self, request: Any, context: Context) -> Any:
        if isinstance(request, _Malformed):
            await self._refuse(request, context)
        return request

    async def _each(self, requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
        async def checked() -> AsyncIterator[Any]:
            async for request in requests:
                yield await self._one(request, context)

        return checked()

    async def _refuse(self, request: _Malformed, context: Context) -> NoReturn:
        try:
            await self._pace.turn(STRANGERS)
        except OutOfCapacity as error:
            await abort(context, error)
        await abort(context, InvalidRequest(f"the request cannot be read: {request.reason}"))


def _behind(check: Check, behaviour: Callable[[Any, Context], Any]) -> Callable[[Any, Context], Any]:
    """gRPC looks at the function to see whether it generates its responses or writes them itself."""
    if inspect.isasyncgenfunction(behaviour):

        async def generate(request: Any, context: Context) -> AsyncIterator[Any]:
            async for response in behaviour(await check(request, context), context):
                yield response

        return generate

    async def answer(request: Any, context: Context) -> Any:
        checked = await check(request, context)
        try:
            result = behaviour(checked, context)
            return await result if inspect.isawaitable(result) else result
        except NotImplementedError:  # what grpcio-health-checking generates for Health.List and leaves so
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "this server does not implement the call")

    return answer


def _safe(parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def parsed(message: bytes) -> Any:
        try:
            return parse(message)
        except DecodeError as error:
            return _Malformed(str(error))

    return parsed
