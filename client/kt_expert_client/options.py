"""What a run asks of the server beside its adapter."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

from kt_expert_proto.environment import RUN_OPTIONS
from kt_expert_proto.v1 import service_pb2 as pb

from kt_expert_client.errors import InvalidRequest

_GIB = 1024**3
_TICKETS = {"activations": pb.TICKET_POLICY_ACTIVATIONS, "inputs": pb.TICKET_POLICY_INPUTS}
_EXISTING = ("refuse", "keep", "replace")
_LOCATIONS = ("server", "trainer")
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
    lora_location: "server" has LoRA parameters, gradients and moments there; "trainer" keeps them here, sends values that have
    changed before each forward and gets the gradients of each backward, for optimizers that the server does not know.
    alone: the model is this rank's only, as one that rank 0 evaluates with; its run waits for no other rank.
    existing: where a named run (KT_EXPERT_RUN) has adapters of an earlier start: "refuse" raises, "keep" goes on with their
    values in place of those that adapters begin with, "replace" begins anew.
    lora_experts: how many extra experts each block gets beside those on the server, on the trainer's own device, each of
    lora_expert_size (see add_lora_experts); 0 for none.
    non_finite: "allow" computes with NaN and infinity as in process; "refuse" looks at all that is sent, and raises.
    """

    tickets: str = "activations"
    moments: str = "fp32"
    dropout: float = 0.0
    replay_window: float = 0.0
    non_finite: str = "allow"
    lora_location: str = "server"
    alone: bool = False
    existing: str = "refuse"
    lora_experts: int = 0
    lora_expert_size: int = 1024  # kt-kernel's

    def __post_init__(self) -> None:
        if not 0.0 <= self.dropout < 1.0:
            raise InvalidRequest(f"dropout is {self.dropout}, expected a probability in [0, 1)")
        if not 0.0 <= self.replay_window < math.inf:
            raise InvalidRequest(f"replay_window is {self.replay_window}, expected GiB of memory, or 0 for none")
        if self.lora_experts < 0 or self.lora_expert_size < 1:
            raise InvalidRequest(
                f"{self.lora_experts} lora_experts of lora_expert_size {self.lora_expert_size}: expected 0 or more of 1 or more"
            )
        chosen = (
            ("tickets", self.tickets, _TICKETS),
            ("moments", self.moments, _MOMENTS),
            ("non_finite", self.non_finite, _NON_FINITE),
            ("lora_location", self.lora_location, _LOCATIONS),
            ("existing", self.existing, _EXISTING),
        )
        for name, value, known in chosen:
            if value not in known:
                raise InvalidRequest(f"{name} is {value!r}, expected one of {', '.join(known)}")

    @classmethod
    def from_environment(cls) -> RunOptions:
        """Their variables (kt_expert_proto.environment), where they are set. Raises InvalidRequest."""
        chosen = {option: os.environ[name] for option, name in RUN_OPTIONS.items() if name in os.environ}
        try:
            settings: dict[str, Any] = {
                option: _READERS[option](RUN_OPTIONS[option], text) if option in _READERS else text
                for option, text in chosen.items()
            }
            return cls(**settings)
        except InvalidRequest as error:
            given = ", ".join(f"{RUN_OPTIONS[option]}={text}" for option, text in chosen.items())
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


def _number(name: str, text: str) -> float:
    """Raises InvalidRequest for text that is none."""
    try:
        return float(text)
    except ValueError:
        raise InvalidRequest(f"{name} is {text!r}, expected a number") from None


def _count(name: str, text: str) -> int:
    """Raises InvalidRequest for text that is none."""
    if not text.isdecimal():
        raise InvalidRequest(f"{name} is {text!r}, expected a whole number")
    return int(text)


def _switch(name: str, text: str) -> bool:
    """Raises InvalidRequest for text that is neither."""
    if text not in ("0", "1"):
        raise InvalidRequest(f"{name} is {text!r}, expected 0 or 1")
    return text == "1"


_READERS = {  # of options that are no text
    "dropout": _number,
    "replay_window": _number,
    "alone": _switch,
    "lora_experts": _count,
    "lora_expert_size": _count,
}
