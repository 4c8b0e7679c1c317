"""Which weights a model has: a digest of samples of every expert tensor.

Two checkpoints of the same weights have the same one, however they are cut into files and whatever else their config says;
a base model and its instruct version do not. The samples are far apart and few, so that it takes less than a second for 100 GB.
It finds mistakes: somebody who changes weights on purpose can keep to what lies between the samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from kt_expert_server.model.safetensors_file import SafetensorsFile, TensorInfo

_SAMPLE_BYTES = 4096  # a page is what a disk gives at least
_BYTES_PER_SAMPLE = 64 * 1024**2  # one for each matrix of an expert, some for a tensor of all experts
Tensors = Mapping[str, tuple[str, TensorInfo]]  # file and place by name


def content_digest(directory: Path, layers: Mapping[str, Tensors]) -> str:
    """Of expert tensors, in hexadecimal. `layers` maps what a layer computes, in words, to its tensors. Raises ModelError for a
    file that ends early."""
    by_file: dict[str, list[tuple[int, str, TensorInfo]]] = {}
    for number, tensors in enumerate(layers.values()):
        for name, (file_name, info) in tensors.items():
            by_file.setdefault(file_name, []).append((number, name, info))
    samples = {}
    for file_name, found in sorted(by_file.items()):
        with SafetensorsFile(directory / file_name) as file:
            for number, name, info in sorted(found, key=lambda entry: entry[2].begin):
                samples[number, name] = _sampled(file, info)
    total = hashlib.sha256()
    for number, (about, tensors) in enumerate(layers.items()):
        total.update(f"{about}\n".encode())
        for name, (_, info) in sorted(tensors.items()):
            total.update(f"{name}\0{info.dtype}\0{info.shape}\n".encode() + samples[number, name])
    return total.hexdigest()


def _sampled(file: SafetensorsFile, info: TensorInfo) -> bytes:
    digest = hashlib.sha256()
    for begin, size in _places(info.size_bytes):
        sample = bytearray(size)
        file.read_into(info, begin, memoryview(sample))
        digest.update(sample)
    return digest.digest()


def _places(size_bytes: int) -> Iterable[tuple[int, int]]:
    """Begin and size of each sample: in the middle of equal parts of the tensor."""
    parts = 1 + size_bytes // _BYTES_PER_SAMPLE
    for part in range(parts):
        begin, end = part * size_bytes // parts, (part + 1) * size_bytes // parts
        size = min(_SAMPLE_BYTES, end - begin)
        yield begin + (end - begin - size) // 2, size
