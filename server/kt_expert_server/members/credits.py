"""What one member may have in flight."""

from __future__ import annotations

from kt_expert_server.errors import OutOfCapacity


class Credits:
    """Requests without an acknowledged outcome, and the bytes of their tensors and results."""

    def __init__(self, requests: int, size_bytes: int) -> None:
        self._requests, self._size_bytes = requests, size_bytes
        self.used_requests = self.used_bytes = 0

    def take(self, size_bytes: int) -> None:
        """Raises OutOfCapacity where the member has not that much left."""
        if self.used_requests >= self._requests or self.used_bytes + size_bytes > self._size_bytes:
            raise OutOfCapacity(
                f"{self.used_requests} requests and {self.used_bytes} bytes are without an acknowledged outcome and "
                f"{size_bytes} more came, the credits are {self._requests} and {self._size_bytes}; acknowledge outcomes first"
            )
        self.used_requests += 1
        self.used_bytes += size_bytes

    def give_back(self, size_bytes: int) -> None:
        self.used_requests -= 1
        self.used_bytes -= size_bytes
        assert self.used_requests >= 0 <= self.used_bytes, "credits were given back twice"  # noqa: S101
