"""Ranks other than 0 wait for the values that rank 0 writes, as DDP's ranks take rank 0's: rank 0 itself waits for nobody."""

from __future__ import annotations

from kt_expert_client.run import Run
from kt_expert_client.waiting import wait_until


def await_writes(run: Run, adapter: str, count: int) -> None:
    """Until rank 0 has written this often to an adapter. Raises DeadlineExceeded."""

    def there() -> int:
        return run.adapters.written(adapter)

    wait_until(
        lambda: there() >= count,
        lambda: (
            f"for rank 0 of run {run.name!r} to write adapter {adapter!r}: {there()} of {count} tensors are there. Does rank 0 "
            "load the same adapters?"
        ),
    )
