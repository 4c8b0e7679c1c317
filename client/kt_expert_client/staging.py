"""Tensors between their device and host memory the wire can read.

A CUDA tensor is copied into pinned memory on a side stream; the frame writer waits for that copy's event, the training
stream does not. Results come back the same way. Pinned buffers are kept and reused: pinning per call costs more than a
plain copy.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

import torch
from kt_expert_proto.dtypes import TORCH_NAMES, Dtype

from kt_expert_client.recycled import RecycledMemory

TORCH_DTYPES: dict[Dtype, torch.dtype] = {dtype: getattr(torch, name) for dtype, name in TORCH_NAMES.items()}
_KEPT_BUFFERS = 16  # pinned buffers kept; in flight are at most the member's credits times three


def byte_view(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not copied."""
    if not tensor.numel():
        return memoryview(bytearray())  # an empty result is written into like others
    known = tensor if tensor.dtype is not torch.bfloat16 else tensor.view(torch.int16)  # numpy has no bf16
    view: memoryview = known.numpy().data
    return view.cast("B")


class HostTensor:
    """A contiguous CPU tensor and, where a device copy is still under way, the event that ends it. Implements Source."""

    def __init__(self, tensor: torch.Tensor, ready: torch.cuda.Event | None = None, pinned: HostBuffer | None = None) -> None:
        self.tensor = tensor
        self._ready = ready
        self._pinned = pinned

    @property
    def is_ready(self) -> bool:
        return self._ready is None or self._ready.query()

    def view(self) -> memoryview:
        """Waits for the copy and returns the tensor's bytes."""
        if self._ready is not None:
            self._ready.synchronize()
        return byte_view(self.tensor)

    def release(self) -> None:
        """The bytes are not read any more."""
        pinned, self._pinned = self._pinned, None
        if pinned is not None:
            pinned.release()


class HostBuffer:
    """Memory for one tensor. Implements Buffer. A pinned one goes back to its pool, any other to its last user."""

    def __init__(self, memory: torch.Tensor, size_bytes: int, pool: Staging | None) -> None:
        self._memory = memory
        self._size_bytes = size_bytes
        self._pool = pool

    @property
    def view(self) -> memoryview:
        return byte_view(self._memory)[: self._size_bytes]

    def tensor(self, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor, not copied."""
        return self._memory[: self._size_bytes].view(dtype).view(shape)

    def release(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            pool._give_back(self._memory)


class Staging:
    """Copies for one run; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: list[torch.Tensor] = []
        self._recycled = RecycledMemory()
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def to_host(self, tensor: torch.Tensor, dtype: Dtype, *, borrow: bool) -> HostTensor:
        """A detached host copy. `borrow`: the tensor does not change until the outcome of its request is there, so a CPU
        tensor that is contiguous and of that dtype is used as it lies, and the device need not wait for the copy."""
        source, wanted = tensor.detach() if tensor.requires_grad else tensor, TORCH_DTYPES[dtype]
        if borrow and source.is_cpu and source.dtype is wanted and source.is_contiguous():
            return HostTensor(source)
        if not source.is_cuda:
            host = source.to(dtype=wanted, device="cpu").contiguous()
            is_callers = host.untyped_storage().data_ptr() == source.untyped_storage().data_ptr()
            return HostTensor(host.clone() if is_callers and not borrow else host)
        stream = self._stream(source.device)
        converted = source.to(wanted).contiguous()
        buffer = self.buffer(converted.nbytes, pinned=True)
        target = buffer.tensor(wanted, tuple(converted.shape))
        stream.wait_stream(torch.cuda.current_stream(source.device))
        with torch.cuda.stream(stream):
            target.copy_(converted, non_blocking=True)
            event = torch.cuda.Event()
            event.record(stream)
        converted.record_stream(stream)
        if (
            not borrow
        ):  # what the caller does next to its tensor comes after the copy, on the device: the host waits for neither
            torch.cuda.current_stream(source.device).wait_event(event)
        return HostTensor(target, event, buffer)

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

    def buffer(self, size_bytes: int, *, pinned: bool) -> HostBuffer:
        """Memory of at least so many bytes, from the pool where it is to be pinned."""
        # A buffer outlives the call that made it, so it must not be an inference tensor.
        with torch.inference_mode(mode=False):
            if not pinned:
                return HostBuffer(self._recycled.take(size_bytes), size_bytes, None)
            with self._lock:
                for index, memory in enumerate(self._free):
                    if memory.nbytes >= size_bytes:
                        return HostBuffer(self._free.pop(index), size_bytes, self)
            return HostBuffer(torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True), size_bytes, self)

    def _give_back(self, memory: torch.Tensor) -> None:
        with self._lock:
            if len(self._free) < _KEPT_BUFFERS:
                self._free.append(memory)

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        with self._lock:
            if device not in self._streams:
                self._streams[device] = torch.cuda.Stream(device)
            return self._streams[device]


class Delivery:
    """One received tensor on its way to its device: moved once, however often it is asked for."""

    def __init__(self, staging: Staging, wire: Dtype, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> None:
        self._staging = staging
        self._wire = TORCH_DTYPES[wire]
        self._shape = shape
        self._device = device
        self._dtype = dtype
        self._delivered: torch.Tensor | None = None

    def tensor(self, received: HostBuffer) -> torch.Tensor:
        """The tensor on its device. The first call gives its pinned buffer back."""
        if self._delivered is None:
            host = received.tensor(self._wire, self._shape)
            self._delivered = self._staging.to_device(host, self._device, self._dtype)
            received.release()
        return self._delivered

    def receive(self, fill: Callable[[memoryview], bool]) -> torch.Tensor | None:
        """The same for a tensor whose bytes `fill` receives; None where it says that there are none. To be called once."""
        if self._device.type != "cuda":
            host = torch.empty(self._shape, dtype=self._wire)
            return host.to(dtype=self._dtype, device=self._device) if fill(byte_view(host)) else None
        buffer = self._staging.buffer(math.prod(self._shape) * self._wire.itemsize, pinned=True)
        if not fill(buffer.view):
            buffer.release()
            return None
        return self.tensor(buffer)
