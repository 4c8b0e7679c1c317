"""Errors of the server. Each maps to exactly one gRPC status code and one exit status::

ServerError
|- InvalidRequest        INVALID_ARGUMENT     2   a wrong shape, dtype, id, value or name
|- NotFound              NOT_FOUND            3   an unknown run, ticket, layer or checkpoint
|- AlreadyExists         ALREADY_EXISTS       4   a run of another configuration, a rank or a name that is taken
|- WrongPhase            FAILED_PRECONDITION  5   a stale epoch, a consumed ticket, an unfitting phase
|- OutOfCapacity         RESOURCE_EXHAUSTED   6   memory budget, credits, or a full disk
|  `- OverQuota                                    an identity's quota
|- DeadlinePassed        DEADLINE_EXCEEDED    7   a deadline passed, for a barrier with the missing ranks
|- RequestCancelled      CANCELLED            8   the caller cancelled
|- ServerUnavailable     UNAVAILABLE          9   loading or draining
|- ModelError            (start-up only)      10  a model directory that cannot be served
|- ListenError           (start-up only)      11  an address that cannot be bound
|- Aborted               ABORTED              12  what others did made it impossible; the same may succeed if asked again
|  |- BarrierBroken                               another member's end or request made a barrier impossible
|  `- StreamReplaced                              a newer stream of the same trainer took this one's place
|- StreamDamaged         DATA_LOSS            15  a stream's bytes are not what was sent; another one may do better
|- NotPermitted          PERMISSION_DENIED    13  a run of another identity, or a call outside the identity's scopes
|- NotAuthenticated      UNAUTHENTICATED      14  no token, or one the server does not know
`- InternalError         INTERNAL             70  a fault of the server
"""

from __future__ import annotations


class ServerError(Exception):
    """Base of every error the server raises on purpose. The message says what came, what was expected, what to do.

    `retry_delay_s` above 0: the same may succeed after this time.
    """

    code: str = "INTERNAL"  # name of a gRPC status code; the edge turns it into the enumerator
    exit_status: int = 70

    def __init__(self, message: str, *, retry_delay_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_delay_s = retry_delay_s


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
    """`missing_bytes`: how much more memory there would have to be; 0 where something else ran out."""

    code = "RESOURCE_EXHAUSTED"
    exit_status = 6

    def __init__(self, message: str, *, retry_delay_s: float = 0.0, missing_bytes: int = 0) -> None:
        super().__init__(message, retry_delay_s=retry_delay_s)
        self.missing_bytes = missing_bytes


class OverQuota(OutOfCapacity):
    """What other identities give back does not help."""


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


class Aborted(ServerError):
    code = "ABORTED"
    exit_status = 12


class BarrierBroken(Aborted):
    pass


class StreamReplaced(Aborted):
    pass


class StreamDamaged(ServerError):
    code = "DATA_LOSS"
    exit_status = 15


class NotPermitted(ServerError):
    code = "PERMISSION_DENIED"
    exit_status = 13


class NotAuthenticated(ServerError):
    code = "UNAUTHENTICATED"
    exit_status = 14


class InternalError(ServerError):
    pass
