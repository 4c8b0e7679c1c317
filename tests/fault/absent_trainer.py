"""A trainer that is away for a while. Arguments: server address, how (of MODES), and for how many seconds."""

from __future__ import annotations

import ctypes
import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import kt_expert_client as kt
from kt_expert_client import AdamW, Run
from support.batches import LORA, train_step

STEPS = 3
MODES = ("before", "between", "within", "after", "busy", "stopped")


def digest(run: Run) -> str:
    total = hashlib.sha256()
    for key, tensor in sorted(run.get_adapter(moments=True).items(), key=str):
        total.update(f"{key}".encode())
        total.update(tensor.numpy().tobytes())
    return total.hexdigest()


def be_away(mode: str, seconds: float) -> None:
    if mode == "stopped":
        subprocess.Popen(["sh", "-c", f"sleep {seconds}; kill -CONT {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)
    elif mode == "busy":  # in C code that does not let go of the interpreter's lock
        ctypes.PyDLL(None).sleep(int(seconds))
    else:
        time.sleep(seconds)


def main() -> None:
    address, mode, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
    with kt.connect(address) as client:
        run = client.open_run(f"{mode}-{seconds:g}", lora=LORA, wire_dtype="fp32", seed=3)
        if mode == "before":
            be_away(mode, seconds)
        for step in range(STEPS):
            train_step(run, step)
            if step == 1 and mode in ("within", "busy", "stopped"):  # with gradients that count
                be_away(mode, seconds)
            train_step(run, 10 + step)
            run.step(AdamW(1e-2))
            if step == 0 and mode == "between":
                be_away(mode, seconds)
        if mode == "after":
            be_away(mode, seconds)
        print(digest(run), flush=True)


if __name__ == "__main__":
    main()
