"""Immutable checkpoints below the state directory.

Layout: ``checkpoints/<name>/manifest.json`` and one ``adapter-NNN-layer-NNNNN.safetensors`` for each
layer of each adapter, with parameters and moments; adapters are numbered as in the manifest. One is
written beside its final place, synchronised, and renamed when complete, so that at any instant, after any crash, a name stands
for a whole checkpoint or for none.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import re
from collections.abc import Iterator
from itertools import groupby

import numpy as np
import safetensors.numpy
from kt_expert_proto.lora import PARAMETER, SLOTS, STEP
from numpy.typing import NDArray
from safetensors import SafetensorError

from kt_expert_server.adapters.transfer import TensorId
from kt_expert_server.checkpoints.filesystem import Filesystem
from kt_expert_server.checkpoints.manifest import FORMAT_VERSION, Manifest
from kt_expert_server.checkpoints.names import is_automatic_name
from kt_expert_server.checkpoints.snapshot import Snapshot, Tensors
from kt_expert_server.errors import AlreadyExists, InternalError, InvalidRequest, NotFound, OutOfCapacity, ServerError

_ROOT = "checkpoints"
_MANIFEST = "manifest.json"
_PARTIAL_PREFIX = ".partial-"  # no name begins with a dot, so none is mistaken for a partial one
_PARTS = (PARAMETER, *SLOTS, STEP)
_FILE = re.compile(r"adapter-(\d{3,})-layer-\d{5,}\.safetensors")
_log = logging.getLogger(__name__)
_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class CheckpointStore:
    """Called from one thread at a time. Names have been checked (names.py)."""

    def __init__(self, filesystem: Filesystem) -> None:
        self._disk = filesystem

    def prepare(self) -> None:
        """Makes the directory and removes what a crash left half-written. Raises OSError."""
        if not self._disk.exists(_ROOT):
            self._disk.make_directory(_ROOT)
            self._disk.sync_directory()
        for name in self._disk.list_directory(_ROOT):
            if name.startswith(_PARTIAL_PREFIX):
                self._disk.remove_directory(_ROOT, name)

    def write(self, snapshot: Snapshot) -> str:
        """Writes everything but the name. Returns the manifest's sha256. Raises AlreadyExists, OutOfCapacity on a full disk,
        InternalError for what else the disk refuses; nothing is left then."""
        about = snapshot.about
        if self._disk.exists(_ROOT, about.name):
            raise AlreadyExists(f"checkpoint {about.name!r} exists and checkpoints never change; choose another name")
        partial = (_ROOT, _PARTIAL_PREFIX + about.name)
        try:
            self._disk.remove_directory(*partial)
            self._disk.make_directory(*partial)
            files = self._write_layers(partial, [each.name for each in about.adapters], snapshot.tensors)
            size = sum(values.nbytes for _, values in snapshot.tensors)
            fields = {name: getattr(about, name) for name in about.__slots__ if name != "name"}
            raw = Manifest(format_version=FORMAT_VERSION, files=files, size_bytes=size, **fields).to_json()
            self._write_durably(raw, *partial, _MANIFEST)
            self._disk.sync_directory(*partial)
        except OSError as error:
            self.discard(about.name)
            raise _disk_error(f"checkpoint {about.name!r} could not be written", error) from error
        return hashlib.sha256(raw).hexdigest()

    def publish(self, name: str) -> None:
        """Gives a written checkpoint its name. Raises AlreadyExists, OutOfCapacity or InternalError."""
        try:
            self._disk.rename((_ROOT, _PARTIAL_PREFIX + name), (_ROOT, name))
            self._disk.sync_directory(_ROOT)
        except OSError as error:
            self.discard(name)
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                raise AlreadyExists(f"checkpoint {name!r} exists and checkpoints never change; choose another name") from error
            raise _disk_error(f"checkpoint {name!r} could not be renamed", error) from error

    def discard(self, name: str) -> None:
        """Removes what was written and not published. Never fails: a later prepare() tries again."""
        try:
            self._disk.remove_directory(_ROOT, _PARTIAL_PREFIX + name)
        except OSError:
            return

    def remove(self, name: str) -> None:
        """Raises NotFound, or InternalError where the disk refuses."""
        if not self._disk.exists(_ROOT, name):
            raise self._unknown(name)
        # Renamed first, so that a crash in the middle leaves no checkpoint with files missing.
        try:
            self._disk.remove_directory(_ROOT, _PARTIAL_PREFIX + name)
            self._disk.rename((_ROOT, name), (_ROOT, _PARTIAL_PREFIX + name))
            self._disk.sync_directory(_ROOT)
            self._disk.remove_directory(_ROOT, _PARTIAL_PREFIX + name)
        except OSError as error:
            raise _disk_error(f"checkpoint {name!r} could not be removed", error) from error

    def manifest(self, name: str) -> Manifest:
        """Raises NotFound, or InvalidRequest for a manifest that cannot be read."""
        try:
            return Manifest.from_json(self._disk.read_file(_ROOT, name, _MANIFEST))
        except FileNotFoundError:
            raise self._unknown(name) from None
        except OSError as error:
            raise _disk_error(f"the manifest of checkpoint {name!r} could not be read", error) from error

    def digest(self, name: str) -> str:
        """sha256 of the manifest, which holds those of the files."""
        return hashlib.sha256(self._disk.read_file(_ROOT, name, _MANIFEST)).hexdigest()

    def read(self, name: str) -> tuple[Manifest, Tensors]:
        """Every tensor, each file verified against its digest before it is parsed. Raises NotFound or InvalidRequest."""
        manifest = self.manifest(name)
        return manifest, list(self._tensors(name, manifest))

    def names(self) -> list[str]:
        if not self._disk.exists(_ROOT):
            return []
        return [name for name in self._disk.list_directory(_ROOT) if not name.startswith(".")]

    def of_owner(self, owner: str) -> list[tuple[str, Manifest]]:
        """Checkpoints that an identity may read. Damaged ones are logged and passed over."""
        return [(name, manifest) for name, manifest in self._readable() if manifest.owner == owner]

    def of_run(self, run: str) -> list[tuple[str, Manifest]]:
        """Checkpoints of one run, oldest first. Raises InvalidRequest where the manifest of one of its automatic checkpoints is
        damaged: an older one in its place would be a silent loss. Others' damage is logged and passed over."""
        found = [(name, manifest) for name, manifest in self._readable(run) if manifest.run == run]
        return sorted(found, key=lambda entry: entry[1].sequence)

    def _readable(self, run: str = "") -> Iterator[tuple[str, Manifest]]:
        for name in self.names():
            try:
                manifest = self.manifest(name)
            except ServerError as error:
                if run and is_automatic_name(run, name):
                    raise
                _log.warning("checkpoint %r is passed over: %s", name, error)
            else:
                yield name, manifest

    def _write_layers(self, partial: tuple[str, ...], adapters: list[str], tensors: Tensors) -> dict[str, str]:
        files = {}
        for (adapter, layer), entries in groupby(tensors, key=lambda entry: (entry[0].adapter, entry[0].layer)):
            content = {f"{layer}.{tensor.part}.{tensor.tensor}": values for tensor, values in entries}
            raw = safetensors.numpy.save(content)
            file_name = f"adapter-{adapters.index(adapter):03d}-layer-{layer:05d}.safetensors"
            self._write_durably(raw, *partial, file_name)
            files[file_name] = hashlib.sha256(raw).hexdigest()
        return files

    def _write_durably(self, content: bytes, *path: str) -> None:
        self._disk.write_file(content, *path)
        self._disk.sync_file(*path)

    def _tensors(self, name: str, manifest: Manifest) -> Iterator[tuple[TensorId, NDArray[np.float32]]]:
        for file_name, digest in sorted(manifest.files.items()):
            if "/" in file_name or file_name.startswith("."):
                raise InvalidRequest(f"checkpoint {name!r} names a file {file_name!r} outside its directory")
            try:
                raw = self._disk.read_file(_ROOT, name, file_name)
            except OSError as error:
                raise InvalidRequest(f"checkpoint {name!r} lacks {file_name}: {error.strerror}") from error
            if hashlib.sha256(raw).hexdigest() != digest:
                raise InvalidRequest(f"checkpoint {name!r}: {file_name} is damaged, its digest differs from the manifest")
            try:
                content = safetensors.numpy.load(raw)
            except SafetensorError as error:
                raise InvalidRequest(f"checkpoint {name!r}: {file_name} is not safetensors: {error}") from error
            for key, values in content.items():
                yield _tensor_id(_adapter_of(name, file_name, manifest), key), values

    def _unknown(self, name: str) -> NotFound:
        return NotFound(f"checkpoint {name!r} does not exist")


def _adapter_of(checkpoint: str, file_name: str, manifest: Manifest) -> str:
    match = _FILE.fullmatch(file_name)
    if match is None or int(match[1]) >= len(manifest.adapters):
        raise InvalidRequest(f"checkpoint {checkpoint!r} has a file {file_name!r} of none of its adapters")
    return manifest.adapters[int(match[1])].name


def _tensor_id(adapter: str, key: str) -> TensorId:
    parts = key.split(".")
    if len(parts) != 3 or not parts[0].isdigit() or parts[1] not in _PARTS:
        raise InvalidRequest(f"checkpoint tensor {key!r} is not named <layer>.<part>.<tensor>")
    return TensorId(adapter, int(parts[0]), parts[2], parts[1])


def _disk_error(what: str, error: OSError) -> ServerError:
    if error.errno in _DISK_IS_FULL:
        return OutOfCapacity(
            f"{what}: the disk of --state-dir is full ({error.strerror}); nothing was kept. Free space and save again"
        )
    return InternalError(f"{what}: {error.strerror or error}; is --state-dir writable?")
