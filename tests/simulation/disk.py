"""A disk that forgets what was not synchronised when the machine dies, and that may be full or die in the middle."""

from __future__ import annotations

import errno
import random
from collections.abc import Iterable
from dataclasses import dataclass, field


class MachineDiedError(Exception):
    """The process is gone: nothing of what it was about to do happens."""


@dataclass(eq=False)
class _File:
    content: bytes
    is_synced: bool = False


@dataclass(frozen=True)
class _Change:
    """Of one directory's names, as its journal holds it: removed, then added."""

    removed: str | None
    added: str | None
    node: _File | _Directory | None


@dataclass(eq=False)
class _Directory:
    names: dict[str, _File | _Directory] = field(default_factory=dict)  # what a process sees
    kept: dict[str, _File | _Directory] = field(default_factory=dict)  # what survives for certain
    journal: list[_Change] = field(default_factory=list)  # between the two, in order

    def change(self, removed: str | None, added: str | None, node: _File | _Directory | None) -> None:
        change = _Change(removed, added, node)
        _apply(self.names, change)
        self.journal.append(change)


def _apply(names: dict[str, _File | _Directory], change: _Change) -> None:
    if change.removed is not None:
        names.pop(change.removed, None)
    if change.added is not None and change.node is not None:
        names[change.added] = change.node


class SimulatedDisk:
    """Implements Filesystem. Changes of one directory survive in their order; bytes of a file may be cut anywhere."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._root = _Directory()
        self.is_full = False
        self.dies_after: int | None = None  # operations until the machine dies

    def crash(self) -> None:
        """The machine dies and starts again."""
        self._crash(self._root)
        self.dies_after = None

    def _crash(self, directory: _Directory) -> None:
        for change in directory.journal[: self._rng.randrange(len(directory.journal) + 1)]:
            _apply(directory.kept, change)
        directory.names, directory.journal = dict(directory.kept), []
        for node in directory.names.values():
            if isinstance(node, _Directory):
                self._crash(node)
            elif not node.is_synced:
                node.content = node.content[: self._rng.randrange(len(node.content) + 1)]
                node.is_synced = True

    def make_directory(self, *path: str) -> None:
        self._operate()
        self._parent(path, new=True).change(None, path[-1], _Directory())

    def write_file(self, content: bytes, *path: str) -> None:
        parent, file = self._parent(path, new=True), _File(content[: self._rng.randrange(len(content) + 1)])
        parent.change(None, path[-1], file)
        self._operate()
        if self.is_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        file.content = content

    def sync_file(self, *path: str) -> None:
        self._operate()
        self._file(path).is_synced = True

    def sync_directory(self, *path: str) -> None:
        self._operate()
        directory = self._directory(path)
        directory.kept, directory.journal = dict(directory.names), []

    def rename(self, old: Iterable[str], new: Iterable[str]) -> None:
        self._operate()
        old_path, new_path = tuple(old), tuple(new)
        assert old_path[:-1] == new_path[:-1], "the store renames within one directory"
        parent = self._parent(old_path)
        node, target = parent.names[old_path[-1]], parent.names.get(new_path[-1])
        if isinstance(target, _Directory) and target.names:
            raise OSError(errno.ENOTEMPTY, "not empty")
        parent.change(old_path[-1], new_path[-1], node)

    def remove_directory(self, *path: str) -> None:
        if not self.exists(*path):
            return
        directory = self._directory(path)
        for name in sorted(directory.names):  # one by one: a death in between leaves some
            self._operate()
            directory.change(name, None, None)
        self._operate()
        self._parent(path).change(path[-1], None, None)

    def list_directory(self, *path: str) -> list[str]:
        return sorted(self._directory(path).names)

    def read_file(self, *path: str) -> bytes:
        return self._file(path).content

    def exists(self, *path: str) -> bool:
        try:
            return path[-1] in self._parent(path).names
        except FileNotFoundError:
            return False

    def _operate(self) -> None:
        if self.dies_after is not None:
            self.dies_after -= 1
            if self.dies_after < 0:
                raise MachineDiedError

    def _directory(self, path: tuple[str, ...]) -> _Directory:
        node: _File | _Directory = self._root
        for name in path:
            if not isinstance(node, _Directory) or name not in node.names:
                raise FileNotFoundError(errno.ENOENT, "no such file or directory", "/".join(path))
            node = node.names[name]
        assert isinstance(node, _Directory)
        return node

    def _parent(self, path: tuple[str, ...], *, new: bool = False) -> _Directory:
        parent = self._directory(path[:-1])
        if new and path[-1] in parent.names:
            raise FileExistsError(errno.EEXIST, "exists", "/".join(path))
        if not new and path[-1] not in parent.names:
            raise FileNotFoundError(errno.ENOENT, "no such file or directory", "/".join(path))
        return parent

    def _file(self, path: tuple[str, ...]) -> _File:
        node = self._parent(path).names[path[-1]]
        assert isinstance(node, _File)
        return node
