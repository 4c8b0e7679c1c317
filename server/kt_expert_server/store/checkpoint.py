"""Immutable snapshots of runs under the state directory.

Layout: ``checkpoints/<name>/manifest.json`` and one ``layer-NNNNN.safetensors`` per layer with parameters and moments. A
snapshot is written beside its final place and renamed when complete, so a reader never sees half of one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from kt_expert_server.errors import AlreadyExists, InternalError, InvalidRequest, NotFound, OutOfCapacity
from kt_expert_server.runtime.adapter_io import PARTS, TensorId, stored_tensors
from kt_expert_server.runtime.names import check_name
from kt_expert_server.runtime.run import LayerLora, Run, RunConfig

FORMAT_VERSION = 1
_MANIFEST = "manifest.json"
_PARTIAL_PREFIX = ".partial-"  # no name begins with a dot, so none is mistaken for a partial one
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a snapshot says of itself. `files` maps names to sha256."""

    format_version: int
    run: str
    model_digest: str
    step: int
    config: RunConfig
    files: dict[str, str]
    size_bytes: int

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1, sort_keys=True).encode()

    @classmethod
    def from_json(cls, raw: bytes) -> Manifest:
        """Raises InvalidRequest for a manifest this version cannot read."""
        try:
            fields = json.loads(raw)
            config = fields.pop("config")
            lora = tuple(LayerLora(**entry) for entry in config.pop("lora"))
            manifest = cls(config=RunConfig(lora=lora, **config), **fields)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InvalidRequest(f"the checkpoint's manifest cannot be read: {error}") from error
        if manifest.format_version != FORMAT_VERSION:
            raise InvalidRequest(f"the checkpoint has format {manifest.format_version}, this server reads {FORMAT_VERSION}")
        return manifest


class CheckpointStore:
    """Saves and reads snapshots below one directory."""

    def __init__(self, state_dir: Path) -> None:
        self._root = state_dir / "checkpoints"

    def prepare(self) -> None:
        """Raises OSError where the directory cannot be made."""
        self._root.mkdir(parents=True, exist_ok=True)

    def save(self, run: Run, name: str, model_digest: str, progress: Progress) -> str:
        """Writes a snapshot and returns the manifest's sha256. Raises AlreadyExists, or OutOfCapacity on a full disk."""
        target = self._root / check_name("checkpoint", name)
        if target.exists():
            raise AlreadyExists(f"checkpoint {name!r} exists and checkpoints never change; choose another name")
        partial = self._root / (_PARTIAL_PREFIX + name)
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir()
            manifest = _write_layers(run, partial, model_digest, progress)
            raw = manifest.to_json()
            _write_durably(partial / _MANIFEST, raw)
            _sync_directory(partial)
            partial.rename(target)
            _sync_directory(self._root)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise OutOfCapacity(
                    f"checkpoint {name!r} does not fit on the disk of --state-dir ({error.strerror}); nothing was kept. "
                    "Free space and save again"
                ) from error
            raise InternalError(f"checkpoint {name!r} could not be written: {error.strerror}") from error
        return hashlib.sha256(raw).hexdigest()

    def read_manifest(self, name: str) -> Manifest:
        path = self._root / check_name("checkpoint", name) / _MANIFEST
        if not path.is_file():
            known = ", ".join(self.names()) or "none"
            raise NotFound(f"checkpoint {name!r} does not exist; there are: {known}")
        return Manifest.from_json(path.read_bytes())

    def tensors(self, name: str, manifest: Manifest) -> Iterator[tuple[TensorId, NDArray[np.float32]]]:
        """Every tensor, each file verified against its digest before it is parsed. Raises InvalidRequest."""
        for file_name, digest in sorted(manifest.files.items()):
            path = self._root / name / Path(file_name).name
            try:
                raw = path.read_bytes()
            except OSError as error:
                raise InvalidRequest(f"checkpoint {name!r} lacks {path.name}: {error.strerror}") from error
            if hashlib.sha256(raw).hexdigest() != digest:
                raise InvalidRequest(f"checkpoint {name!r}: {path.name} is damaged, its digest differs from the manifest")
            try:
                content = safetensors.numpy.load(raw)
            except SafetensorError as error:
                raise InvalidRequest(f"checkpoint {name!r}: {path.name} is not safetensors: {error}") from error
            for key, values in content.items():
                yield _tensor_id(key), values

    def names(self) -> list[str]:
        if not self._root.is_dir():
            return []
        complete = [path.name for path in self._root.iterdir() if (path / _MANIFEST).is_file()]
        return sorted(name for name in complete if not name.startswith(_PARTIAL_PREFIX))


def _write_layers(run: Run, directory: Path, model_digest: str, progress: Progress) -> Manifest:
    stored = list(stored_tensors(run, parameters=True, moments=True))
    total = sum(live.nbytes for _, live in stored)
    files, done = {}, 0
    # One layer at a time in fp32: moments may be held in less.
    for layer, entries in groupby(stored, key=lambda entry: entry[0].layer):
        tensors = {f"{layer}.{tensor.part}.{tensor.tensor}": live.read() for tensor, live in entries}
        raw = safetensors.numpy.save(tensors)
        file_name = f"layer-{layer:05d}.safetensors"
        _write_durably(directory / file_name, raw)
        files[file_name] = hashlib.sha256(raw).hexdigest()
        done += sum(values.nbytes for values in tensors.values())
        progress(done, total)
    return Manifest(FORMAT_VERSION, run.name, model_digest, run.step, run.config, files, total)


def _tensor_id(key: str) -> TensorId:
    parts = key.split(".")
    if len(parts) != 3 or not parts[0].isdigit() or parts[1] not in PARTS:
        raise InvalidRequest(f"checkpoint tensor {key!r} is not named <layer>.<part>.<tensor>")
    return TensorId(int(parts[0]), parts[2], parts[1])


def _write_durably(path: Path, raw: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        view = memoryview(raw)
        while view:
            view = view[os.write(fd, view) :]
        os.fsync(fd)
    finally:
        os.close(fd)


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
