"""The variables kt-expert reads. One that nobody reads is a mistake, and would be a silent one."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

PREFIX = "KT_EXPERT_"
RUN_OPTIONS = {  # what a trainer's RunOptions are where it gives none
    "tickets": "KT_EXPERT_TICKETS",
    "moments": "KT_EXPERT_MOMENTS",
    "dropout": "KT_EXPERT_DROPOUT",
    "replay_window": "KT_EXPERT_REPLAY_WINDOW",
    "non_finite": "KT_EXPERT_NON_FINITE",
    "lora_location": "KT_EXPERT_LORA_LOCATION",
    "alone": "KT_EXPERT_ALONE",
    "existing": "KT_EXPERT_EXISTING",
    "lora_experts": "KT_EXPERT_LORA_EXPERTS",
    "lora_expert_size": "KT_EXPERT_LORA_EXPERT_SIZE",
}
# The folder that a trainer's processes write their traces to, and which optimizer steps of them.
TRACE_VARIABLE, TRACE_STEPS_VARIABLE = "KT_EXPERT_TRACE", "KT_EXPERT_TRACE_STEPS"
KNOWN = (
    "KT_EXPERT_SERVER",
    "KT_EXPERT_RUN",
    *RUN_OPTIONS.values(),
    "KT_EXPERT_TRANSPORT",
    "KT_EXPERT_SAME_HOST_DIR",
    "KT_EXPERT_SPIN",
    "KT_EXPERT_PROFILE",
    TRACE_VARIABLE,
    TRACE_STEPS_VARIABLE,
    "KT_EXPERT_TOKEN_FILE",
    "KT_EXPERT_CA",
    "KT_EXPERT_CERT",
    "KT_EXPERT_KEY",
    "KT_EXPERT_ISA",
)


def unknown_variable(environment: Mapping[str, str]) -> str | None:
    """A sentence about the first variable that looks like one of kt-expert's and is none. None where all are known."""
    for name in sorted(environment):
        if name.startswith(PREFIX) and name not in KNOWN:
            nearest = difflib.get_close_matches(name, KNOWN, n=1, cutoff=0.0)[0]
            return f"the environment sets {name}, which kt-expert does not know; did you mean {nearest}?"
    return None
