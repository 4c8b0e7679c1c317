"""Errors a trainer can see. Each stands for one gRPC status code; the message is the server's own where it comes from it::

KtExpertError (RuntimeError)
|- InvalidRequest      INVALID_ARGUMENT     a wrong shape, dtype, id, value or name
|- NotFound            NOT_FOUND            an unknown run, member, ticket, layer or checkpoint
|- AlreadyExists       ALREADY_EXISTS       a run of that name with another configuration
|- WrongPhase          FAILED_PRECONDITION  a stale epoch, a consumed ticket, a model that does not match
|- OutOfCapacity       RESOURCE_EXHAUSTED   the server's memory, credits or disk
|- DeadlineExceeded    DEADLINE_EXCEEDED    a deadline passed
|- Cancelled           CANCELLED            the request was cancelled
|- ServerUnavailable   UNAVAILABLE          the server is loading, draining, or cannot be reached
|- ServerFault         any other            a fault of the server or of the connection
`- UnsupportedModel    (client only)        a model, adapter or optimizer the client cannot offload
"""

from __future__ import annotations

from typing import Any

import grpc


class KtExpertError(RuntimeError):
    """Base of all errors of the client."""


class InvalidRequest(KtExpertError):
    pass


class NotFound(KtExpertError):
    pass


class AlreadyExists(KtExpertError):
    pass


class WrongPhase(KtExpertError):
    pass


class OutOfCapacity(KtExpertError):
    pass


class DeadlineExceeded(KtExpertError):
    pass


class Cancelled(KtExpertError):
    pass


class ServerUnavailable(KtExpertError):
    pass


class ServerFault(KtExpertError):
    pass


class UnsupportedModel(KtExpertError):
    pass


_BY_NUMBER: dict[int, type[KtExpertError]] = {
    1: Cancelled,
    3: InvalidRequest,
    4: DeadlineExceeded,
    5: NotFound,
    6: AlreadyExists,
    8: OutOfCapacity,
    9: WrongPhase,
    14: ServerUnavailable,
}


def from_status(number: int, message: str) -> KtExpertError:
    """The error for a gRPC status code's number."""
    return _BY_NUMBER.get(number, ServerFault)(message)


def from_rpc(error: grpc.RpcError, what: str) -> KtExpertError:
    """The error for a failed call, with what was being done."""
    call: Any = error  # every error of a finished call is a grpc.Call too; the stubs do not say so
    code, details = call.code(), call.details() or str(error)
    return from_status(code.value[0], f"{what}: {details}")
