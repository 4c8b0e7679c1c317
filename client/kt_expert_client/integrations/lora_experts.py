"""Extra experts beside those on the server: small SwiGLU networks on the trainer's own device.

Each mixture-of-experts block adds the mean of their outputs to its own. The last matrix of each begins at zero, so that a model
begins as it was without them. They are kt-kernel's LoRA experts, under its names (kt_kernel/sft/lora.py, 0.7.2):
`...mlp.lora_experts.I.le_{gate,up,down}.weight`. PEFT trains, saves and loads them where `modules_to_save` names them.
"""

from __future__ import annotations

import importlib.metadata
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from kt_expert_client.errors import InvalidRequest, UnsupportedModel
from kt_expert_client.integrations.experts import RemoteExperts, local_spec
from kt_expert_client.parameters.tensor import RemoteTensor

_log = logging.getLogger("kt_expert_client")
NAME = "lora_experts"  # what modules_to_save is to have
DEFAULT_NUMBER = 2  # kt-kernel's
DEFAULT_SIZE = 1024  # kt-kernel's
_STATE = "_kt_beside"
_OF_AN_ADAPTER = re.compile(
    r"^[^.]+\.\d+\.le_"
)  # PEFT has put the adapter's name in front of what it takes for a matrix of LoRA


class LoraExpert(nn.Module):
    """[..., H] -> [..., H], by way of intermediate_size: down(silu(gate(x)) * up(x))."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.le_gate = nn.Linear(hidden_size, intermediate_size, bias=False, device=device, dtype=dtype)
        self.le_up = nn.Linear(hidden_size, intermediate_size, bias=False, device=device, dtype=dtype)
        self.le_down = nn.Linear(intermediate_size, hidden_size, bias=False, device=device, dtype=dtype)
        nn.init.zeros_(self.le_down.weight)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gated = nn.functional.silu(self.le_gate(hidden_states)) * self.le_up(hidden_states)
        down: torch.Tensor = self.le_down(gated)
        return down


class LoraExperts(nn.Module):
    """[..., H] -> [..., H]: the mean of its experts. Those are named 0, 1 and so on; PEFT does not save a ModuleList."""

    def __init__(
        self,
        number: int,
        hidden_size: int,
        intermediate_size: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._has_told = False
        for index in range(number):
            self.add_module(str(index), LoraExpert(hidden_size, intermediate_size, device, dtype))

    def tell_if_frozen(self) -> None:
        """Once: PEFT freezes, and does not save, what its configuration does not name."""
        if not self._has_told and not any(parameter.requires_grad for parameter in self.parameters()):
            self._has_told = True
            _log.warning(
                'extra experts of this model do not train; with PEFT, add "%s" to the modules_to_save of its configuration',
                NAME,
            )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        outputs = [expert(hidden_states) for expert in self.children()]
        return torch.stack(outputs).mean(dim=0) if len(outputs) > 1 else outputs[0]


@dataclass(eq=False, slots=True)
class _Beside:
    """What one pass of a block has so far: its input, and what the extra experts make of it."""

    hidden_states: torch.Tensor | None = None
    output: torch.Tensor | None = None


def add_lora_experts(
    model: nn.Module,
    number: int = DEFAULT_NUMBER,
    intermediate_size: int = DEFAULT_SIZE,
    layers: Iterable[int] | None = None,
) -> list[LoraExperts]:
    """Gives the blocks of these layers, by default of all with experts on a server, extra experts of their own. They train.

    Call it before get_peft_model, whose configuration then names them: LoraConfig(modules_to_save=["lora_experts"], ...).
    They are computed while the server computes. Raises InvalidRequest for numbers below 1, a layer without remote experts, a
    block that has some already, and a model that PEFT has wrapped.
    """
    if number < 1 or intermediate_size < 1:
        raise InvalidRequest(f"{number} extra experts of size {intermediate_size}: expected 1 of size 1 or more")
    blocks = _blocks(model)
    wanted = sorted(blocks if layers is None else set(layers))
    missing = [layer for layer in wanted if layer not in blocks]
    if missing or not blocks:
        raise InvalidRequest(f"layers {missing} have no experts on a server; those that have: {sorted(blocks) or 'none'}")
    if any(hasattr(blocks[layer][0], NAME) for layer in wanted):
        raise InvalidRequest("this model has extra experts already; load it anew for others")
    return [_add(*blocks[layer], number, intermediate_size) for layer in wanted]


def watch_blocks(model: nn.Module) -> None:
    """From now on, loading a state with extra experts that would be dropped raises UnsupportedModel."""
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if isinstance(module, RemoteExperts):
            modules[name.rpartition(".")[0]].register_load_state_dict_pre_hook(_expect_no_lost_experts)


def _blocks(model: nn.Module) -> dict[int, tuple[nn.Module, RemoteExperts]]:
    """By layer: the block around the experts, and the experts."""
    found: dict[int, tuple[nn.Module, RemoteExperts]] = {}
    modules: dict[str, Any] = dict(model.named_modules())
    for name, module in modules.items():
        if isinstance(module, RemoteExperts) and module.kt_layer is not None:
            if name.endswith("base_layer") or hasattr(model, "peft_config"):
                raise InvalidRequest("extra experts are added before PEFT wraps the model, so that it saves them")
            found[module.kt_layer.layer] = modules[name.rpartition(".")[0]], module
    return found


def _add(block: nn.Module, experts: RemoteExperts, number: int, intermediate_size: int) -> LoraExperts:
    remote: Any = experts
    own = [each for each in block.parameters() if not isinstance(each, RemoteTensor)]
    hidden_size = local_spec("layers.0", experts).hidden_size
    added = LoraExperts(number, hidden_size, intermediate_size, own[0].device if own else None, remote.down_proj.dtype)
    block.add_module(NAME, added)
    object.__setattr__(block, _STATE, _Beside())
    block.register_forward_pre_hook(_begin, with_kwargs=True)
    block.register_forward_hook(_end)
    return added


@torch.compiler.disable  # type: ignore[untyped-decorator]  # it goes with the experts' call, which is not compiled either
def _begin(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """The block is called: its experts are told what to do while they wait for the server."""
    state = _Beside(args[0] if args else kwargs["hidden_states"])
    object.__setattr__(block, _STATE, state)
    lora_experts = getattr(block, NAME)
    is_recording = torch.is_grad_enabled()
    if block.training and is_recording and isinstance(lora_experts, LoraExperts):
        lora_experts.tell_if_frozen()

    def compute() -> None:
        with torch.set_grad_enabled(is_recording):
            state.output = lora_experts(state.hidden_states)

    if _get_current_dispatch_mode() is not None:
        return  # selective checkpointing may not make the experts' call again, and must find the same operations in each pass
    for module in block.modules():
        if isinstance(module, RemoteExperts):
            module.kt_meanwhile = compute
            return


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _end(block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Adds to the block's output, or to the first of several."""
    del args
    state: _Beside = getattr(block, _STATE)
    object.__setattr__(block, _STATE, _Beside())
    extra = state.output if state.output is not None else getattr(block, NAME)(state.hidden_states)
    if isinstance(output, tuple):
        return (output[0] + extra, *output[1:])
    return output + extra


def peft_version() -> str:
    """Of the installed PEFT."""
    return importlib.metadata.version("peft")


def _expect_no_lost_experts(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """A load_state_dict pre-hook of a block. PEFT drops tensors that its configuration does not name without a word, and so
    extra experts of an adapter that comes with them. Raises UnsupportedModel."""
    start = f"{prefix}{NAME}."
    keys = [key for key in state_dict if key.startswith(start)]
    own = getattr(module, NAME, None)
    if own is not None and not isinstance(own, LoraExperts):  # PEFT has wrapped them, and saves and loads them
        lost = sorted({key.removeprefix(start) for key in keys} - set(own.state_dict()))
        if lost:
            raise UnsupportedModel(
                f"PEFT {peft_version()} gives the adapter's extra experts a name that none of the model's has "
                f"({NAME}.{lost[0]}), and would drop them; take a newer PEFT"
            )
        return
    if not keys:
        return
    if own is not None and not any(_OF_AN_ADAPTER.match(key.removeprefix(start)) for key in keys):
        return  # they find their places
    if own is None:
        raise UnsupportedModel(
            f"the adapter has extra experts ({keys[0]}) and this model has none; load the model with "
            "RunOptions(lora_experts=N, lora_expert_size=SIZE) of the adapter's"
        )
    raise UnsupportedModel(
        f"the adapter has extra experts ({keys[0]}) that its adapter_config.json does not name, so PEFT would drop them; add "
        f'"{NAME}" to its modules_to_save, or write it anew with kt-expert checkpoint import-adapter'
    )
