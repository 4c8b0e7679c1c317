"""Errors of the server. Each maps to exactly one gRPC status code and one exit status::

ServerError
|- InvalidRequest        INVALID_ARGUMENT     2   a wrong shape, dtype, id, value or name
|- NotFound              NOT_FOUND            3   an unknown run, member, ticket, layer or checkpoint
|- AlreadyExists         ALREADY_EXISTS       4   a run of that name with another configuration
|- WrongPhase            FAILED_PRECONDITION  5   a stale epoch, a consumed ticket, an unfitting phase
|- OutOfCapacity         RESOURCE_EXHAUSTED   6   memory budget, credits, or a full disk
|- DeadlinePassed        DEADLINE_EXCEEDED    7   a deadline passed, for a barrier with the missing ranks
|- RequestCancelled      CANCELLED            8   the caller cancelled
|- ServerUnavailable     UNAVAILABLE          9   loading or draining
|- ModelError            (start-up only)      10  a model directory that cannot be served
|- ListenError           (start-up only)      11  an address that cannot be bound
`- InternalError         INTERNAL             70  a fault of the server
"""

from __future__ import annotations


class ServerError(Exception):
    """Base of every error the server raises on purpose. The message says what came, what was expected, what to do."""

    code: str = "INTERNAL"  # name of a gRPC status code; the edge turns it into the enumerator
    exit_status: int = 70


class InvalidRequest(ServerError):
    code = "INVALID_ARGUMENT"
    exit_status = 2


class NotFound(ServerError):
    code = "NOT_FOUND"
    exit_status = 3


class AlreadyExists(ServerError):
    code = "ALREADY_EXISTS"
    exit_status = 4


class WrongPhase(ServerError):
    code = "FAILED_PRECONDITION"
    exit_status = 5


class OutOfCapacity(ServerError):
    code = "RESOURCE_EXHAUSTED"
    exit_status = 6


class DeadlinePassed(ServerError):
    code = "DEADLINE_EXCEEDED"
    exit_status = 7


class RequestCancelled(ServerError):
    code = "CANCELLED"
    exit_status = 8


class ServerUnavailable(ServerError):
    code = "UNAVAILABLE"
    exit_status = 9


class ModelError(ServerError):
    exit_status = 10


class ListenError(ServerError):
    exit_status = 11


class InternalError(ServerError):
    pass
