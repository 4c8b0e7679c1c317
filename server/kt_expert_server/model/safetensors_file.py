"""Reads tensors of a safetensors file straight into memory the caller owns.

The safetensors library hands out copies or mappings; both would count against the server's memory beside the weights
themselves. So the header is parsed here (format: https://github.com/huggingface/safetensors, "Format") and the bytes are
read into place. Every size is checked before anything is allocated or read.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from kt_expert_server.errors import ModelError

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_LENGTH_BYTES = 8
FLOAT_BYTES = {"BF16": 2, "F16": 2, "F32": 4}
DTYPE_BYTES = FLOAT_BYTES | {"F8_E4M3": 1, "U8": 1}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies in its file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int  # from the start of the file
    size_bytes: int


class SafetensorsFile:
    """One open file. Raises ModelError for anything that is not a well-formed safetensors file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ModelError(f"cannot open {path.name}: {error.strerror}") from error
        try:
            self.tensors = self._read_header()
        except BaseException:
            os.close(self._fd)
            raise

    @property
    def name(self) -> str:
        return self._path.name

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self._fd)

    def read_into(self, info: TensorInfo, offset: int, target: memoryview) -> None:
        """Fills `target` with the tensor's bytes from `offset` on. Raises ModelError at an early end of file."""
        view = target.cast("B")
        if offset < 0 or offset + view.nbytes > info.size_bytes:
            raise ModelError(f"{self._path.name}: a read of {view.nbytes} bytes at {offset} leaves its tensor")
        position, done = info.begin + offset, 0
        while done < view.nbytes:
            count = os.preadv(self._fd, [view[done:]], position + done)
            if count == 0:
                raise ModelError(f"{self._path.name} ends at byte {position + done}, inside a tensor: it is truncated")
            done += count

    def _read_header(self) -> dict[str, TensorInfo]:
        file_bytes = os.fstat(self._fd).st_size
        raw_length = os.pread(self._fd, _LENGTH_BYTES, 0)
        length = int.from_bytes(raw_length, "little")
        if len(raw_length) < _LENGTH_BYTES or length > min(MAX_HEADER_BYTES, file_bytes - _LENGTH_BYTES):
            raise ModelError(f"{self._path.name} is not a safetensors file: its header would take {length} bytes")
        data_begin = _LENGTH_BYTES + length
        try:
            header = json.loads(os.pread(self._fd, length, _LENGTH_BYTES))
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            return {name: self._tensor_info(name, entry, data_begin, file_bytes) for name, entry in entries.items()}
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ModelError(f"{self._path.name} has a damaged safetensors header: {error}") from error

    def _tensor_info(self, name: str, entry: dict[str, object], data_begin: int, file_bytes: int) -> TensorInfo:
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or not isinstance(shape, list) or not isinstance(offsets, list):
            raise TypeError(f"tensor {name} lacks dtype, shape or data_offsets")
        if any(type(number) is not int for number in (*shape, *offsets)):
            raise TypeError(f"tensor {name} has shape {shape} and data_offsets {offsets}, expected whole numbers")
        (begin, end), sizes = offsets, tuple(shape)
        if not 0 <= begin <= end or data_begin + end > file_bytes or any(size < 0 for size in sizes):
            raise ModelError(f"{self._path.name}: tensor {name} lies outside the file; the file is truncated or damaged")
        if dtype in DTYPE_BYTES:
            expected = DTYPE_BYTES[dtype]
            for size in sizes:
                expected *= size
            if expected != end - begin:
                raise ModelError(f"{self._path.name}: tensor {name} has {end - begin} bytes, its shape says {expected}")
        return TensorInfo(dtype, sizes, data_begin + begin, end - begin)
