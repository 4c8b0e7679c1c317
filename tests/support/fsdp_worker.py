"""One rank of a training under FSDP2 in a loop of its own. Arguments: checkpoint, server address or "-", output file and,
with a server, where LoRA is."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import kt_expert_client as kt
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from support.models import random_tokens
from support.ranks import end_process_group
from support.training import adapted


def main() -> None:
    checkpoint, address, output = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    mesh = init_device_mesh("cpu", (2,))
    options = kt.RunOptions(lora_location="trainer") if sys.argv[4:] == ["trainer"] else None
    model = adapted(checkpoint, None if address == "-" else address, options=options)
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses, norms = [], []
    for step in range(5):
        tokens = random_tokens(2, 10, seed=2 * step + rank)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        norms.append(float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        model.save_pretrained(output.parent / "adapter", state_dict=state)
        output.write_text(json.dumps({"losses": losses, "norms": norms}), encoding="utf-8")
    end_process_group()


if __name__ == "__main__":
    main()
