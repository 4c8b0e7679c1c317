"""A trainer that idles between its steps. Arguments: server address, seconds of idling."""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import kt_expert_client as kt
from kt_expert_client import AdamW
from support.batches import LORA, train_step


def main() -> None:
    address, idle_s = sys.argv[1], float(sys.argv[2])
    with kt.connect(address) as client:
        run = client.open_run(lora=LORA, wire_dtype="fp32", seed=3)
        for step in range(2):
            train_step(run, step)
            run.step(AdamW(1e-2))
            time.sleep(idle_s / 2)
        train_step(run, 2)
        print(run.step(AdamW(1e-2)), run.grad_norm(), flush=True)


if __name__ == "__main__":
    main()
