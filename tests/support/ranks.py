"""What every script under torchrun ends with."""

from __future__ import annotations

import torch


def end_process_group() -> None:
    """After all ranks have come. The last collective is kept until the group is gone: gloo's thread would otherwise give it
    back, which needs the interpreter, while the group's destructor holds the interpreter and waits for that thread."""
    last = torch.distributed.barrier(async_op=True)
    last.wait()
    torch.distributed.destroy_process_group()
    del last
