"""What a run asks of the server beside its adapter."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from kt_expert_proto.v1 import service_pb2 as pb

from kt_expert_client.errors import InvalidRequest

TICKETS_VARIABLE = "KT_EXPERT_TICKETS"
MOMENTS_VARIABLE = "KT_EXPERT_MOMENTS"
DROPOUT_VARIABLE = "KT_EXPERT_DROPOUT"
REPLAY_VARIABLE = "KT_EXPERT_REPLAY_WINDOW"
NON_FINITE_VARIABLE = "KT_EXPERT_NON_FINITE"
_GIB = 1024**3
_TICKETS = {"activations": pb.TICKET_POLICY_ACTIVATIONS, "inputs": pb.TICKET_POLICY_INPUTS}
_NON_FINITE = ("allow", "refuse")
_MOMENTS = {"fp32": pb.MOMENT_DTYPE_FP32, "bf16": pb.MOMENT_DTYPE_BF16}


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Memory against time, and the dropout that PEFT does not offer for expert parameters.

    tickets: "activations" keeps what a backward needs; "inputs" keeps the inputs alone and computes the rest again, to the
    same bits, for about a third of the backward's time and a fraction of the memory. moments: "fp32", or "bf16" for half
    the optimizer's memory. dropout: the probability with which the experts' LoRA drops its inputs while the model trains.
    replay_window: GiB of this host's memory for the requests since the server's last checkpoint, from which a server that was
    killed and started again is brought back to where it was; 0 keeps none, and such a server is a RunStateLost.
    non_finite: "allow" computes with NaN and infinity as in process; "refuse" looks at all that is sent, and raises.
    """

    tickets: str = "activations"
    moments: str = "fp32"
    dropout: float = 0.0
    replay_window: float = 0.0
    non_finite: str = "allow"

    def __post_init__(self) -> None:
        if not 0.0 <= self.dropout < 1.0:
            raise InvalidRequest(f"dropout is {self.dropout}, expected a probability in [0, 1)")
        if not 0.0 <= self.replay_window < math.inf:
            raise InvalidRequest(f"replay_window is {self.replay_window}, expected GiB of memory, or 0 for none")
        chosen = (
            ("tickets", self.tickets, _TICKETS),
            ("moments", self.moments, _MOMENTS),
            ("non_finite", self.non_finite, _NON_FINITE),
        )
        for name, value, known in chosen:
            if value not in known:
                raise InvalidRequest(f"{name} is {value!r}, expected one of {', '.join(known)}")

    @classmethod
    def from_environment(cls) -> RunOptions:
        """The variables above, where they are set. Raises InvalidRequest."""
        names = (TICKETS_VARIABLE, MOMENTS_VARIABLE, DROPOUT_VARIABLE, REPLAY_VARIABLE, NON_FINITE_VARIABLE)
        try:
            return cls(
                os.environ.get(TICKETS_VARIABLE, "activations"),
                os.environ.get(MOMENTS_VARIABLE, "fp32"),
                _number(DROPOUT_VARIABLE),
                _number(REPLAY_VARIABLE),
                os.environ.get(NON_FINITE_VARIABLE, "allow"),
            )
        except InvalidRequest as error:
            given = ", ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)
            raise InvalidRequest(f"{error} (from the environment: {given})") from None

    @property
    def ticket_policy(self) -> pb.TicketPolicy:
        return _TICKETS[self.tickets]

    @property
    def replay_bytes(self) -> int:
        return int(self.replay_window * _GIB)

    @property
    def moment_dtype(self) -> pb.MomentDtype:
        return _MOMENTS[self.moments]


def _number(name: str) -> float:
    """Raises InvalidRequest for text that is none."""
    text = os.environ.get(name, "0")
    try:
        return float(text)
    except ValueError:
        raise InvalidRequest(f"{name} is {text!r}, expected a number") from None
