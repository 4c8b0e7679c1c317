"""One rank of a training under DeepSpeed. Arguments: checkpoint, server address or "-", ZeRO's stage, where LoRA is, and the
file for what was found, a refusal too."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import deepspeed
import kt_expert_client as kt
import torch

from support.models import random_tokens
from support.training import adapted


def settings(stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def train(engine: Any, rank: int) -> dict[str, list[float]]:
    losses, norms = [], []
    for step in range(5):
        tokens = random_tokens(2, 10, seed=2 * step + rank)
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        norm = engine.get_global_grad_norm()
        norms += [] if norm is None else [float(norm)]  # without ZeRO there is none
        losses.append(float(loss.detach()))
    return {"losses": losses, "norms": norms}


def main() -> None:
    checkpoint, address, stage = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    location, output = sys.argv[4], Path(sys.argv[5])
    deepspeed.init_distributed("gloo")
    rank = torch.distributed.get_rank()
    options = kt.RunOptions(lora_location="trainer" if location == "trainer" else "server")
    try:
        model = adapted(checkpoint, None if address == "-" else address, options=options)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=1e-3)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings(stage))
        found: dict[str, Any] = train(engine, rank)
        found["logits"] = engine(input_ids=random_tokens(2, 9)).logits.float().flatten().tolist()
    except kt.KtExpertError as error:
        found = {"refused": str(error)}
    if rank == 0:
        output.write_text(json.dumps(found), encoding="utf-8")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
