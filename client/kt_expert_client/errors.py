"""Errors a trainer can see. Each stands for one gRPC status code; the message is the server's own where it comes from it::

KtExpertError (RuntimeError)
|- InvalidRequest      INVALID_ARGUMENT     a wrong shape, dtype, id, value or name
|- NotFound            NOT_FOUND            an unknown run, ticket, layer or checkpoint
|- AlreadyExists       ALREADY_EXISTS       a run of another configuration, a rank or a name that is taken
|- WrongPhase          FAILED_PRECONDITION  a consumed ticket, a model that does not match, a phase that does not fit
|- OutOfCapacity       RESOURCE_EXHAUSTED   the server's memory, a quota, credits or disk
|- DeadlineExceeded    DEADLINE_EXCEEDED    a deadline passed
|- Cancelled           CANCELLED            the request was cancelled
|- BarrierBroken       ABORTED              another member's end or request made a step impossible; ask again
|- NotPermitted        PERMISSION_DENIED    a run of another identity, or a call the token does not allow
|- NotAuthenticated    UNAUTHENTICATED      no token, or one the server does not know
|- ServerUnavailable   UNAVAILABLE          the server is loading, draining, or cannot be reached
|- ServerFault         any other            a fault of the server or of the connection
|- RunStateLost        (client only)        the server lost what this trainer had done since a step; `step` names it
`- UnsupportedModel    (client only)        a model, adapter or optimizer the client cannot offload
"""

from __future__ import annotations

import copy
from typing import Any

import grpc
from kt_expert_proto.channel import RETRY_DELAY_KEY
from kt_expert_proto.status import STATUS_NUMBERS

_MS_PER_S = 1000


class KtExpertError(RuntimeError):
    """Base of all errors of the client. `retry_delay_s` above 0: the server says the same may succeed after this time.
    `is_answer`: the server itself said so, and not the network."""

    def __init__(self, message: str, *, retry_delay_s: float = 0.0, is_answer: bool = False) -> None:
        super().__init__(message)
        self.retry_delay_s = retry_delay_s
        self.is_answer = is_answer


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


class BarrierBroken(KtExpertError):
    pass


class NotPermitted(KtExpertError):
    pass


class NotAuthenticated(KtExpertError):
    pass


class ServerUnavailable(KtExpertError):
    pass


class ServerFault(KtExpertError):
    pass


class RunStateLost(KtExpertError):
    """The server began anew from its last checkpoint. Go on from `step`: open the run again and repeat what came after."""

    def __init__(self, message: str, *, step: int) -> None:
        super().__init__(message)
        self.step = step

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled like other errors, which a required keyword would prevent."""
        return _state_lost, (str(self), self.step)


def _state_lost(message: str, step: int) -> RunStateLost:
    return RunStateLost(message, step=step)


class UnsupportedModel(KtExpertError):
    pass


_BY_CODE: dict[str, type[KtExpertError]] = {
    "CANCELLED": Cancelled,
    "INVALID_ARGUMENT": InvalidRequest,
    "DEADLINE_EXCEEDED": DeadlineExceeded,
    "NOT_FOUND": NotFound,
    "ALREADY_EXISTS": AlreadyExists,
    "PERMISSION_DENIED": NotPermitted,
    "RESOURCE_EXHAUSTED": OutOfCapacity,
    "FAILED_PRECONDITION": WrongPhase,
    "ABORTED": BarrierBroken,
    "UNAVAILABLE": ServerUnavailable,
    "UNAUTHENTICATED": NotAuthenticated,
}
_BY_NUMBER = {STATUS_NUMBERS[name]: kind for name, kind in _BY_CODE.items()}


def from_status(number: int, message: str, retry_delay_s: float = 0.0) -> KtExpertError:
    """The server's answer with a gRPC status code's number."""
    return _BY_NUMBER.get(number, ServerFault)(message, retry_delay_s=retry_delay_s, is_answer=True)


def from_rpc(error: grpc.RpcError, what: str) -> KtExpertError:
    """The error for a failed call, with what was being done."""
    call: Any = error  # every error of a finished call is a grpc.Call too; the stubs do not say so
    code, details = call.code(), call.details() or str(error)
    delay = next((str(value) for key, value in call.trailing_metadata() or () if key == RETRY_DELAY_KEY), "")
    found = from_status(code.value[0], f"{what}: {details}", int(delay) / _MS_PER_S if delay.isdigit() else 0.0)
    found.is_answer = delay.isdigit()
    return found


def copy_of(error: KtExpertError) -> KtExpertError:
    """One to raise anew: an error object that is raised twice collects the tracebacks of both."""
    return copy.copy(error)
