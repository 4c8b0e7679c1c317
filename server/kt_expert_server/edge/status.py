"""How the server's errors leave through gRPC."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn, TypeVar

import grpc
from kt_expert_proto.channel import RETRY_DELAY_KEY

from kt_expert_server.errors import ServerError
from kt_expert_server.observe.metrics import Metrics

Response = TypeVar("Response")
_MS_PER_S = 1000
_log = logging.getLogger(__name__)


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: ServerError) -> NoReturn:
    trailing = ((RETRY_DELAY_KEY, str(round(error.retry_delay_s * _MS_PER_S))),)
    await context.abort(grpc.StatusCode[error.code], str(error), trailing)
    raise AssertionError("abort returns never")


async def abort_fault(context: grpc.aio.ServicerContext[Any, Any], method: str) -> NoReturn:
    """An unforeseen exception: the log gets the traceback, the client an id to find it by."""
    fault = secrets.token_hex(4)
    _log.exception("fault %s in %s", fault, method)
    await context.abort(grpc.StatusCode.INTERNAL, f"internal fault {fault}; see the server's log")
    raise AssertionError("abort returns never")


class CallGuard:
    """Runs a call's body: counts it, maps ServerError to its status, and hides everything else behind an id."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    async def unary(
        self, method: str, context: grpc.aio.ServicerContext[Any, Any], body: Callable[[], Awaitable[Response]]
    ) -> Response:
        begun, code = time.monotonic(), "OK"
        self._metrics.call_started(method)
        try:
            return await body()
        except ServerError as error:
            code = error.code
            await abort(context, error)
        except asyncio.CancelledError:
            code = "CANCELLED"
            raise
        except Exception:  # the last place that can turn it into a status
            code = "INTERNAL"
            await abort_fault(context, method)
        finally:
            self._metrics.call_ended(method, code, time.monotonic() - begun)
