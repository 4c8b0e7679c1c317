"""One rank of two, of which rank 0 does things alone. Arguments: checkpoint, server address, output folder.

Rank 0 evaluates with a second model of its own and loads an adapter into the model that both train, while rank 1 goes on to the
next step, as scripts do under `if rank == 0`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import kt_expert_client as kt
import torch
from peft import PeftModel
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from support.models import random_tokens
from support.ranks import end_process_group
from support.training import adapted, logits


def main() -> None:
    checkpoint, address, output = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    model = adapted(checkpoint, address)
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for step in range(3):
        tokens = random_tokens(2, 10, seed=2 * step + rank)
        loss = wrapped(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if rank == 0 and step == 0:
            model.save_pretrained(output / "saved")
            with kt.offload_experts(address, kt.RunOptions(alone=True)):
                base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
            tokens = random_tokens(2, 9)
            alone = logits(PeftModel.from_pretrained(base, output / "saved"), tokens)
            model.load_adapter(output / "saved", "again")
            model.set_adapter("again")
            within = logits(model, tokens)
            model.set_adapter("default")
            model.train()
            assert torch.equal(alone, within)
    (output / f"losses{rank}.json").write_text(json.dumps(losses), encoding="utf-8")
    end_process_group()


if __name__ == "__main__":
    main()
