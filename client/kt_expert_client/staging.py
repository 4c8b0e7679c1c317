"""Tensors between their device and host memory the wire can read.

A CUDA tensor is copied into pinned memory on a side stream; the frame writer waits for that copy's event, the training
stream does not. Results come back the same way. Pinned buffers are kept and reused: pinning per call costs more than a
plain copy.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch

WIRE_TORCH_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_KEPT_BUFFERS = 16  # pinned buffers kept per dtype; in flight are at most the member's credits times three


def byte_view(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not copied."""
    if not tensor.numel():
        return memoryview(b"")
    view: memoryview = tensor.view(torch.uint8).reshape(-1).numpy().data
    return view


@dataclass(frozen=True, slots=True)
class HostTensor:
    """A contiguous CPU tensor and, where a device copy is still under way, the event that ends it."""

    tensor: torch.Tensor
    ready: torch.cuda.Event | None = None

    def view(self) -> memoryview:
        """Waits for the copy and returns the tensor's bytes."""
        if self.ready is not None:
            self.ready.synchronize()
        return byte_view(self.tensor)


class Staging:
    """Copies for one run; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: dict[torch.dtype, list[torch.Tensor]] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def to_host(self, tensor: torch.Tensor, dtype: torch.dtype) -> HostTensor:
        """A detached host copy in `dtype`; a CPU tensor that is contiguous and of that dtype is not copied."""
        source = tensor.detach()
        if not source.is_cuda:
            return HostTensor(source.to(dtype=dtype, device="cpu").contiguous())
        stream = self._stream(source.device)
        converted = source.to(dtype).contiguous()
        target = self.host_buffer(converted.shape, dtype, pinned=True)
        stream.wait_stream(torch.cuda.current_stream(source.device))
        with torch.cuda.stream(stream):
            target.copy_(converted, non_blocking=True)
            event = torch.cuda.Event()
            event.record(stream)
        converted.record_stream(stream)
        return HostTensor(target, event)

    def to_device(self, tensor: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """A received host tensor on `device` in `dtype`, ordered before what the current stream does next."""
        if device.type != "cuda":
            return tensor.to(dtype=dtype, device=device)
        stream = self._stream(device)
        with torch.cuda.stream(stream):
            moved = tensor.to(device=device, non_blocking=True).to(dtype)
            event = torch.cuda.Event()
            event.record(stream)
        current = torch.cuda.current_stream(device)
        current.wait_stream(stream)
        moved.record_stream(current)
        event.synchronize()  # the pinned buffer is reused after this
        return moved

    def host_buffer(self, shape: torch.Size | tuple[int, ...], dtype: torch.dtype, *, pinned: bool) -> torch.Tensor:
        """A contiguous host tensor, pinned from the pool where asked."""
        if not pinned:
            return torch.empty(shape, dtype=dtype)
        size = 1
        for extent in shape:
            size *= extent
        # A buffer outlives the call that made it, so it must not be an inference tensor.
        with self._lock, torch.inference_mode(mode=False):
            free = self._free.setdefault(dtype, [])
            for index, buffer in enumerate(free):
                if buffer.numel() >= size:
                    return free.pop(index)[:size].view(shape)
            return torch.empty(size, dtype=dtype, pin_memory=True).view(shape)

    def give_back(self, tensor: torch.Tensor) -> None:
        """Returns a pinned buffer to the pool."""
        if tensor.numel() and tensor.is_pinned():
            base = tensor if tensor._base is None else tensor._base
            with self._lock:
                free = self._free.setdefault(tensor.dtype, [])
                if len(free) < _KEPT_BUFFERS:
                    free.append(base.reshape(-1))

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        with self._lock:
            if device not in self._streams:
                self._streams[device] = torch.cuda.Stream(device)
            return self._streams[device]


class Delivery:
    """One received tensor on its way to its device: moved once, however often it is asked for."""

    def __init__(self, staging: Staging, host: torch.Tensor, device: torch.device, dtype: torch.dtype) -> None:
        self._staging = staging
        self._host: torch.Tensor | None = host
        self._device = device
        self._dtype = dtype
        self._delivered: torch.Tensor | None = None

    def tensor(self) -> torch.Tensor:
        """The tensor on its device. The first call gives its pinned buffer back."""
        if self._delivered is None:
            assert self._host is not None  # noqa: S101  # present until delivered
            self._delivered = self._staging.to_device(self._host, self._device, self._dtype)
            if self._device.type == "cuda":
                self._staging.give_back(self._host)
            self._host = None
        return self._delivered
