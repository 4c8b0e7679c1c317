"""Which weights a model has: a digest of samples of every matrix of every expert.

Two checkpoints of the same tensors have the same one, however they are cut into files and whatever else their config says; a
base model and its instruct version do not. The samples are few, so that it takes less than a second for 100 GB. It finds
mistakes: somebody who changes weights on purpose can keep to what lies between the samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kt_expert_server.model.safetensors_file import SafetensorsFile, TensorInfo

_SAMPLE_BYTES = 4096  # a page is what a disk gives at least
_BYTES_PER_SAMPLE = 64 * 1024**2  # of one matrix: most have one sample


@dataclass(frozen=True, slots=True)
class LayerContent:
    """`about` says what the layer computes, but for the weights; `tensors` maps names to file and place."""

    about: str
    experts: int
    tensors: Mapping[str, tuple[str, TensorInfo]]


def content_digest(directory: Path, layers: Sequence[LayerContent]) -> str:
    """Of expert tensors, in hexadecimal. Raises ModelError for a file that ends early."""
    by_file: dict[str, list[tuple[int, str, TensorInfo]]] = {}
    for number, layer in enumerate(layers):
        for name, (file_name, info) in layer.tensors.items():
            by_file.setdefault(file_name, []).append((number, name, info))
    samples = {}
    for file_name, found in sorted(by_file.items()):
        with SafetensorsFile(directory / file_name) as file:
            for number, name, info in sorted(found, key=lambda entry: entry[2].begin):
                # A tensor of all experts has a sample of each, as tensors of one expert have.
                matrices = info.shape[0] if info.shape[0] == layers[number].experts else 1
                samples[number, name] = _sampled(file, info, matrices)
    total = hashlib.sha256()
    for number, layer in enumerate(layers):
        total.update(f"{layer.about}\n".encode())
        for name, (_, info) in sorted(layer.tensors.items()):
            total.update(f"{name}\0{info.dtype}\0{info.shape}\n".encode() + samples[number, name])
    return total.hexdigest()


def _sampled(file: SafetensorsFile, info: TensorInfo, matrices: int) -> bytes:
    digest = hashlib.sha256()
    for begin, size in _places(info.size_bytes, matrices):
        sample = bytearray(size)
        file.read_into(info, begin, memoryview(sample))
        digest.update(sample)
    return digest.digest()


def _places(size_bytes: int, matrices: int) -> Iterable[tuple[int, int]]:
    """Begin and size of each sample: in the middle of equal parts of the tensor, at least one a matrix."""
    parts = matrices * (1 + size_bytes // matrices // _BYTES_PER_SAMPLE)
    for part in range(parts):
        begin, end = part * size_bytes // parts, (part + 1) * size_bytes // parts
        size = min(_SAMPLE_BYTES, end - begin)
        yield begin + (end - begin - size) // 2, size
