"""What a run asks of the server beside its adapter."""

from __future__ import annotations

import os
from dataclasses import dataclass

from kt_expert_proto.v1 import service_pb2 as pb

from kt_expert_client.errors import InvalidRequest

TICKETS_VARIABLE = "KT_EXPERT_TICKETS"
MOMENTS_VARIABLE = "KT_EXPERT_MOMENTS"
DROPOUT_VARIABLE = "KT_EXPERT_DROPOUT"
_TICKETS = {"activations": pb.TICKET_POLICY_ACTIVATIONS, "inputs": pb.TICKET_POLICY_INPUTS}
_MOMENTS = {"fp32": pb.MOMENT_DTYPE_FP32, "bf16": pb.MOMENT_DTYPE_BF16}


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Memory against time, and the dropout that PEFT does not offer for expert parameters.

    tickets: "activations" keeps what a backward needs; "inputs" keeps the inputs alone and computes the rest again, to the
    same bits, for about a third of the backward's time and a fraction of the memory. moments: "fp32", or "bf16" for half
    the optimizer's memory. dropout: the probability with which the experts' LoRA drops its inputs while the model trains.
    """

    tickets: str = "activations"
    moments: str = "fp32"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.dropout < 1.0:
            raise InvalidRequest(f"dropout is {self.dropout}, expected a probability in [0, 1)")
        for name, value, known in (("tickets", self.tickets, _TICKETS), ("moments", self.moments, _MOMENTS)):
            if value not in known:
                raise InvalidRequest(f"{name} is {value!r}, expected one of {', '.join(known)}")

    @classmethod
    def from_environment(cls) -> RunOptions:
        """KT_EXPERT_TICKETS, KT_EXPERT_MOMENTS and KT_EXPERT_DROPOUT, where they are set. Raises InvalidRequest."""
        names = (TICKETS_VARIABLE, MOMENTS_VARIABLE, DROPOUT_VARIABLE)
        tickets, moments, dropout = (
            os.environ.get(name, default) for name, default in zip(names, ("activations", "fp32", "0"), strict=True)
        )
        try:
            return cls(tickets, moments, float(dropout))
        except ValueError:
            raise InvalidRequest(f"{DROPOUT_VARIABLE} is {dropout!r}, expected a number") from None
        except InvalidRequest as error:
            said = ", ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)
            raise InvalidRequest(f"{error} (from the environment: {said})") from None

    @property
    def ticket_policy(self) -> pb.TicketPolicy:
        return _TICKETS[self.tickets]

    @property
    def moment_dtype(self) -> pb.MomentDtype:
        return _MOMENTS[self.moments]
