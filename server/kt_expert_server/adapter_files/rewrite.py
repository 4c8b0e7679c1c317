"""Writing a checkpoint's files anew, one tensor at a time, and reading back what was changed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from crc32c import crc32c

from kt_expert_server.errors import InvalidRequest
from kt_expert_server.model.safetensors_file import SafetensorsFile, TensorInfo

_PIECE_BYTES = 64 * 1024 * 1024  # of a tensor that is copied as it is
_LENGTH_BYTES = 8
_ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "U8": 1, "F8_E4M3": 1}  # of what is written anew
INDEX_NAME = "model.safetensors.index.json"

Pieces = Callable[[], Iterator[bytes | memoryview]]


@dataclass(frozen=True, slots=True)
class Written:
    """A tensor of the new file. `pieces` makes its bytes, in order; None copies the old one's."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: Pieces | None = None

    def size_bytes(self, copied: TensorInfo) -> int:
        return copied.size_bytes if self.pieces is None else math.prod(self.shape) * _ITEM_BYTES[self.dtype]


Rewrite = Callable[[str, TensorInfo], Written | None]  # what a tensor becomes; None leaves it out


def write_shard(source: Path, target: Path, rewrite: Rewrite) -> dict[str, int]:
    """The tensors in the order they lie in; returns their sizes by name. Raises InvalidRequest where what was changed does not
    read back as it was written. Format: https://github.com/huggingface/safetensors, "Format"."""
    checksums = {}
    with SafetensorsFile(source) as file, target.open("xb") as stream:
        ordered = sorted(file.tensors.items(), key=lambda entry: entry[1].begin)
        pairs = [(info, written) for name, info in ordered if (written := rewrite(name, info)) is not None]
        sizes = [(written, written.size_bytes(info)) for info, written in pairs]
        _write_header(stream, sizes)
        for info, written in pairs:
            if written.pieces is None:
                for piece in _pieces(file, info):
                    stream.write(piece)
            else:
                checksums[written.name] = _write(stream, written.pieces())
    _read_back(target, checksums)
    return {written.name: size for written, size in sizes}


def write_index(directory: Path, shards: Mapping[str, Mapping[str, int]]) -> None:
    """The index of tensors that were written, by file, with their sizes."""
    weight_map = {name: shard for shard, sizes in shards.items() for name in sizes}
    total = sum(size for sizes in shards.values() for size in sizes.values())
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, sort_keys=True)
    (directory / INDEX_NAME).write_text(text + "\n", encoding="utf-8")


def _write(stream: BinaryIO, pieces: Iterable[bytes | memoryview]) -> int:
    checksum = 0
    for piece in pieces:
        checksum = crc32c(piece, checksum)
        stream.write(piece)
    return checksum


def _write_header(stream: BinaryIO, sizes: Sequence[tuple[Written, int]]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for written, size in sizes:
        header[written.name] = {
            "dtype": written.dtype,
            "shape": list(written.shape),
            "data_offsets": [begin, begin + size],
        }
        begin += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    stream.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)


def _pieces(file: SafetensorsFile, info: TensorInfo) -> Iterator[memoryview]:
    for begin in range(0, info.size_bytes, _PIECE_BYTES):
        piece = memoryview(bytearray(min(_PIECE_BYTES, info.size_bytes - begin)))
        file.read_into(info, begin, piece)
        yield piece


def _read_back(path: Path, checksums: Mapping[str, int]) -> None:
    with SafetensorsFile(path) as file:
        for name, checksum in checksums.items():
            got = 0
            for piece in _pieces(file, file.tensors[name]):
                got = crc32c(piece, got)
            if got != checksum:
                raise InvalidRequest(f"{name} in {path} is not what was written; is the disk sound?")
