"""The few things the checkpoint store asks of a disk, below one directory and never through a link."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

from kt_expert_server.errors import InvalidRequest

_PROBE_PREFIX = ".probe-"


class Filesystem(Protocol):
    """Paths are names below the root, joined by nothing: ("a", "b") is a/b. All may raise OSError.

    What was not synchronised may be lost, in part or whole, when the machine ends: a file's bytes until sync_file, a name or
    a rename until sync_directory of the directory that holds it.
    """

    def make_directory(self, *path: str) -> None: ...
    def write_file(self, content: bytes, *path: str) -> None:
        """A new file; one that exists is an error."""

    def sync_file(self, *path: str) -> None: ...
    def sync_directory(self, *path: str) -> None: ...
    def rename(self, old: Iterable[str], new: Iterable[str]) -> None: ...
    def remove_directory(self, *path: str) -> None:
        """With all its files. Nothing happens where it does not exist."""

    def list_directory(self, *path: str) -> list[str]: ...
    def read_file(self, *path: str) -> bytes: ...
    def exists(self, *path: str) -> bool: ...


class LocalFilesystem:
    """A directory of this machine. Components are opened one by one with O_NOFOLLOW, so a link among them is an error."""

    def __init__(self, root: Path) -> None:
        self._root = root

    @classmethod
    def create(cls, root: Path) -> LocalFilesystem:
        """Makes the directory where it does not exist. Raises InvalidRequest where it cannot be used."""
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor, probe = tempfile.mkstemp(prefix=_PROBE_PREFIX, dir=root)
            os.close(descriptor)
            os.unlink(probe)
        except OSError as error:
            raise InvalidRequest(
                f"--state-dir {root} cannot be used: {error.strerror}; give a directory that this user may write"
            ) from error
        return cls(root)

    def make_directory(self, *path: str) -> None:
        with self._parent(path) as parent:
            os.mkdir(path[-1], 0o700, dir_fd=parent)

    def write_file(self, content: bytes, *path: str) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        with self._parent(path) as parent:
            fd = os.open(path[-1], flags, 0o600, dir_fd=parent)
            try:
                view = memoryview(content)
                while view:
                    view = view[os.write(fd, view) :]
            finally:
                os.close(fd)

    def sync_file(self, *path: str) -> None:
        with self._parent(path) as parent:
            fd = os.open(path[-1], os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=parent)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def sync_directory(self, *path: str) -> None:
        with self._opened(path) as fd:
            os.fsync(fd)

    def rename(self, old: Iterable[str], new: Iterable[str]) -> None:
        old_path, new_path = tuple(old), tuple(new)
        with self._parent(old_path) as old_parent, self._parent(new_path) as new_parent:
            os.rename(old_path[-1], new_path[-1], src_dir_fd=old_parent, dst_dir_fd=new_parent)

    def remove_directory(self, *path: str) -> None:
        with contextlib.suppress(FileNotFoundError), self._parent(path) as parent:
            shutil.rmtree(path[-1], dir_fd=parent)

    def list_directory(self, *path: str) -> list[str]:
        with self._opened(path) as fd:
            return sorted(os.listdir(fd))

    def read_file(self, *path: str) -> bytes:
        with self._parent(path) as parent:
            fd = os.open(path[-1], os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=parent)
            with open(fd, "rb") as file:
                return file.read()

    def exists(self, *path: str) -> bool:
        try:
            with self._parent(path) as parent:
                os.stat(path[-1], dir_fd=parent, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def _parent(self, path: tuple[str, ...]) -> contextlib.AbstractContextManager[int]:
        return self._opened(path[:-1])

    @contextlib.contextmanager
    def _opened(self, path: tuple[str, ...]) -> Iterator[int]:
        """A descriptor of the directory."""
        fd = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for name in path:
                inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=fd)
                os.close(fd)
                fd = inner
            yield fd
        finally:
            os.close(fd)
