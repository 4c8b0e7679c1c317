"""The plug-in under axolotl's own interface and manager. Its trainer is not started: it needs a GPU build of much else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kt_expert_client as kt
import pytest
import torch
from axolotl.integrations.base import BasePlugin, PluginManager
from axolotl.utils.dict import DictDefault
from kt_expert_client.integrations.experts import RemoteExperts
from support.server import ServerProcess
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own
NAME = "kt_expert_client.integrations.axolotl.KtExpertPlugin"


@pytest.fixture
def plugins() -> Iterator[PluginManager]:
    manager = PluginManager.get_instance()
    manager.register(NAME)
    assert isinstance(manager.plugins[NAME], BasePlugin)
    yield manager
    manager.plugins.pop(NAME)


def load(plugins: PluginManager, checkpoint: Path, **config: Any) -> Any:
    """In the order of axolotl's ModelLoader.load."""
    cfg = DictDefault({"base_model": str(checkpoint), **config})
    plugins.pre_model_load(cfg)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    plugins.post_model_build(cfg, model)
    plugins.post_model_load(cfg, model)
    return model


def is_remote(model: torch.nn.Module) -> bool:
    return any(isinstance(module, RemoteExperts) for module in model.modules())


def test_what_axolotl_loads_has_its_experts_on_the_server(
    plugins: PluginManager, server: ServerProcess, qwen3_checkpoint: Path
) -> None:
    options = {"tickets": "inputs", "moments": "bf16"}
    model = load(plugins, qwen3_checkpoint, kt_expert_server=server.address, kt_expert_options=options)
    assert is_remote(model)
    assert model.kt_expert_offload.options == kt.RunOptions("inputs", "bf16")
    assert not is_remote(AutoModelForCausalLM.from_pretrained(qwen3_checkpoint, dtype=torch.float32))  # nothing is left behind


def test_the_keys_are_axolotls_own_from_now_on(plugins: PluginManager) -> None:
    assert plugins.get_input_args() == ["kt_expert_client.integrations.axolotl.KtExpertArgs"]


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({}, "gives no kt_expert_server"),
        ({"kt_expert_server": "there:1", "use_scattermoe": True}, "use_scattermoe is for experts in this process"),
        ({"kt_expert_server": "there:1", "expert_parallel_size": 2}, "expert_parallel_size is for experts in this process"),
        ({"kt_expert_server": "there:1", "kt_expert_options": {"ticket": "inputs"}}, "kt_expert_options has ticket, expected"),
    ],
)
def test_what_cannot_work_says_so(
    plugins: PluginManager, qwen3_checkpoint: Path, config: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(kt.KtExpertError, match=sentence):
        load(plugins, qwen3_checkpoint, **config)
