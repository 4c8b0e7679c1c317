"""The kt-expert client: trains a model whose experts live on a kt-expert-server.

Low level::

    client = kt_expert_client.connect("host:7443")
    run = client.open_run(lora=[...])
    handle = run.submit_forward(layer, hidden_states, expert_ids, routing_weights)
    output = handle.result()

High level: set ``KT_EXPERT_SERVER=host:port`` and import this package, or wrap ``from_pretrained`` in
``offload_experts(address)``, or call ``attach(model)`` in a loop of your own.
"""

from kt_expert_client.adapter import ActiveAdapter, GradientTarget, LayerLora, TensorKey, TensorSet
from kt_expert_client.connection import Client, connect
from kt_expert_client.credentials import Credentials
from kt_expert_client.errors import (
    AlreadyExists,
    BarrierBroken,
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    KtExpertError,
    NotAuthenticated,
    NotFound,
    NotPermitted,
    OutOfCapacity,
    RunStateLost,
    ServerFault,
    ServerUnavailable,
    UnsupportedModel,
    WrongPhase,
)
from kt_expert_client.full import train_in_full
from kt_expert_client.optimizers import Adafactor, Adam, AdamW, ParamGroup, Sgd
from kt_expert_client.options import RunOptions
from kt_expert_client.routing import Routing, record_routing, replay_routing
from kt_expert_client.run import BackwardHandle, ForwardHandle, Run
from kt_expert_client.start import add_lora_experts, attach, enable_from_environment, offload_experts

__all__ = [
    "offload_experts",
    "attach",
    "train_in_full",
    "add_lora_experts",
    "record_routing",
    "replay_routing",
    "Routing",
    "connect",
    "Client",
    "Credentials",
    "Run",
    "ForwardHandle",
    "BackwardHandle",
    "ActiveAdapter",
    "GradientTarget",
    "LayerLora",
    "TensorSet",
    "AdamW",
    "Adam",
    "Sgd",
    "Adafactor",
    "ParamGroup",
    "RunOptions",
    "TensorKey",
    "KtExpertError",
    "InvalidRequest",
    "NotFound",
    "AlreadyExists",
    "WrongPhase",
    "OutOfCapacity",
    "DeadlineExceeded",
    "Cancelled",
    "BarrierBroken",
    "NotPermitted",
    "NotAuthenticated",
    "RunStateLost",
    "ServerUnavailable",
    "ServerFault",
    "UnsupportedModel",
]

enable_from_environment()
