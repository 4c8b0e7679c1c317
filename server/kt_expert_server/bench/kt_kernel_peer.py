"""Runs in a Python that has kt-kernel: times its bf16 forward for the batch sizes that come on standard input.

Arguments: E H I k threads max_tokens. Knows nothing of this project, because that Python need not have it.
"""

from __future__ import annotations

import sys
import time
from typing import Any


def main() -> None:
    import torch
    from kt_kernel import kt_kernel_ext

    experts, hidden, intermediate, top_k, threads, max_tokens = (int(text) for text in sys.argv[1:7])
    pool = kt_kernel_ext.WorkerPoolConfig()
    pool.subpool_count, pool.subpool_numa_map, pool.subpool_thread_count = 1, [0], [threads]
    engine = kt_kernel_ext.CPUInfer(pool)
    shapes = ((intermediate, hidden), (intermediate, hidden), (hidden, intermediate))
    matrices = [[(torch.randn(shape) * hidden**-0.5).bfloat16() for _ in range(experts)] for shape in shapes]
    on_gpu = torch.zeros(experts, dtype=torch.bool)
    config = kt_kernel_ext.moe.MOEConfig(experts, top_k, hidden, intermediate, on_gpu.data_ptr())
    config.layer_idx, config.pool, config.max_len = 0, engine.backend_, max(max_tokens, 32)
    pointers = [[[matrix.data_ptr() for matrix in kind]] for kind in matrices]
    config.gate_projs, config.up_projs, config.down_projs = pointers
    config.gate_scales = config.up_scales = config.down_scales = [[0] * experts]
    kind = getattr(kt_kernel_ext.moe, "AMXBF16_MOE", None) or kt_kernel_ext.moe.AVX2BF16_MOE
    layer = kind(config)
    order = torch.arange(experts, dtype=torch.int64)
    engine.submit(layer.load_weights_task(order.data_ptr()))
    engine.sync()
    del matrices
    print("@ ready", flush=True)
    for line in sys.stdin:
        print(f"@ {_forward(torch, engine, layer, int(line), experts, hidden, top_k)}", flush=True)


def _forward(torch: Any, engine: Any, layer: Any, tokens: int, experts: int, hidden: int, top_k: int) -> float:
    x = torch.randn(tokens, hidden).bfloat16()
    y = torch.empty_like(x)
    ids = torch.rand(tokens, experts).topk(top_k, dim=1).indices.contiguous()
    weights = torch.full((tokens, top_k), 1.0 / top_k)
    count = torch.tensor([tokens], dtype=torch.int32)
    task = layer.forward_task(count.data_ptr(), top_k, ids.data_ptr(), weights.data_ptr(), x.data_ptr(), y.data_ptr(), False)
    begun = time.perf_counter()
    engine.submit(task)
    engine.sync()
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
