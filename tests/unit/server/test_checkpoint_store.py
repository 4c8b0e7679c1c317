"""The checkpoint store on a real disk: immutable, whole or not there, never through a link, damage is found."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kt_expert_proto.lora import LayerLora
from kt_expert_server.adapters.run_config import RunConfig
from kt_expert_server.adapters.transfer import TensorId
from kt_expert_server.checkpoints.filesystem import LocalFilesystem
from kt_expert_server.checkpoints.manifest import AdapterRecord, MemberMark
from kt_expert_server.checkpoints.snapshot import Snapshot, SnapshotAbout
from kt_expert_server.checkpoints.store import CheckpointStore
from kt_expert_server.errors import AlreadyExists, InternalError, InvalidRequest, NotFound, OutOfCapacity

CONFIG = RunConfig(2, "bf16", (LayerLora(3, rank_up=2, scale_up=0.5),), 7)
NAMES = ("default", "second")
ADAPTERS = tuple(AdapterRecord(name, CONFIG.lora, trainable=True, maker="a" * 32) for name in NAMES)


def snapshot(name: str, sequence: int = 1, run: str = "run") -> Snapshot:
    about = SnapshotAbout(
        name, run, "", "digest", 12, {"default": 3}, sequence, automatic=False, restart_point=True,
        members={"0": MemberMark("a" * 32, 40)}, author=MemberMark("a" * 32, 41), config=CONFIG, adapters=ADAPTERS,
    )  # fmt: skip
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    return Snapshot(
        about,
        [(TensorId(adapter, 3, "a_up", part), values + sequence) for adapter in NAMES for part in ("parameter", "exp_avg")],
    )


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    made = CheckpointStore(LocalFilesystem.create(tmp_path / "state"))
    made.prepare()
    return made


def save(store: CheckpointStore, each: Snapshot) -> str:
    digest = store.write(each)
    store.publish(each.about.name)
    return digest


def test_what_is_saved_comes_back(store: CheckpointStore) -> None:
    digest = save(store, snapshot("one"))
    assert store.digest("one") == digest
    manifest, tensors = store.read("one")
    assert (manifest.step, manifest.config, manifest.members["0"].request_id) == (12, CONFIG, 40)
    expected = dict(snapshot("one").tensors)
    assert {tensor: values.tolist() for tensor, values in tensors} == {t: v.tolist() for t, v in expected.items()}


def test_a_checkpoint_is_not_there_before_it_is_published(store: CheckpointStore, tmp_path: Path) -> None:
    store.write(snapshot("one"))
    assert store.names() == []
    with pytest.raises(NotFound, match="checkpoint 'one' does not exist"):
        store.manifest("one")
    store.prepare()  # what the next process does
    assert not any((tmp_path / "state" / "checkpoints").iterdir())


def test_checkpoints_never_change(store: CheckpointStore) -> None:
    save(store, snapshot("one"))
    with pytest.raises(AlreadyExists, match="checkpoints never change"):
        store.write(snapshot("one", 2))
    assert store.manifest("one").sequence == 1
    store.remove("one")
    with pytest.raises(NotFound):
        store.remove("one")
    save(store, snapshot("one", 2))


def test_checkpoints_of_a_run_are_found_in_order(store: CheckpointStore) -> None:
    for name, sequence, run in (("z", 1, "run"), ("a", 2, "run"), ("other", 1, "another")):
        save(store, snapshot(name, sequence, run))
    assert [name for name, _ in store.of_run("run")] == ["z", "a"]


def damage(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


DAMAGE: dict[str, tuple[Any, str]] = {
    "a changed byte": (lambda d: damage(d / "adapter-000-layer-00003.safetensors"), "is damaged, its digest differs"),
    "a missing file": (
        lambda d: (d / "adapter-000-layer-00003.safetensors").unlink(),
        "lacks adapter-000-layer-00003.safetensors",
    ),
    "a manifest that is none": (lambda d: (d / "manifest.json").write_text("{}"), "manifest cannot be read"),
    "another format": (lambda d: (d / "manifest.json").write_text('{"format_version": 99}'), "has format 99"),
    "a file outside": (
        lambda d: (d / "manifest.json").write_text((d / "manifest.json").read_text().replace("layer-00003", "../layer-00003")),
        "outside its directory",
    ),
    "a link": (
        lambda d: (
            (d / "adapter-000-layer-00003.safetensors").rename(d.parent / "real")
            and (d / "adapter-000-layer-00003.safetensors").symlink_to("../real")
        ),
        "lacks adapter-000-layer-00003.safetensors",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_found(store: CheckpointStore, tmp_path: Path, what: str) -> None:
    save(store, snapshot("one"))
    change, text = DAMAGE[what]
    change(tmp_path / "state" / "checkpoints" / "one")
    with pytest.raises(InvalidRequest, match=text):
        store.read("one")


def test_a_linked_checkpoint_is_not_followed(store: CheckpointStore, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "manifest.json").write_text("{}")
    (tmp_path / "state" / "checkpoints" / "linked").symlink_to(outside)
    with pytest.raises(InternalError, match="could not be read"):
        store.manifest("linked")


class FailingDisk(LocalFilesystem):
    """Fails at one operation."""

    fails_at = ""
    number = errno.EIO

    def _fail(self, name: str) -> None:
        if name == self.fails_at:
            raise OSError(self.number, "No space left on device" if self.number == errno.ENOSPC else "Input/output error")

    def write_file(self, content: bytes, *path: str) -> None:
        super().write_file(content[: len(content) // 2], *path) if self.fails_at == "write_file" else None
        self._fail("write_file")
        super().write_file(content, *path)

    def sync_file(self, *path: str) -> None:
        self._fail("sync_file")
        super().sync_file(*path)

    def sync_directory(self, *path: str) -> None:
        self._fail("sync_directory")
        super().sync_directory(*path)

    def rename(self, old: Any, new: Any) -> None:
        self._fail("rename")
        super().rename(old, new)


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOSPC, OutOfCapacity), (errno.EDQUOT, OutOfCapacity), (errno.EROFS, InternalError)]
)
@pytest.mark.parametrize("operation", ["write_file", "sync_file", "sync_directory", "rename"])
def test_a_disk_that_fails_leaves_the_last_checkpoint_whole(
    tmp_path: Path, operation: str, number: int, kind: type[Exception]
) -> None:
    disk = FailingDisk.create(tmp_path)
    assert isinstance(disk, FailingDisk)
    store = CheckpointStore(disk)
    store.prepare()
    save(store, snapshot("first"))
    disk.fails_at, disk.number = operation, number
    with pytest.raises(kind, match="--state-dir"):
        save(store, snapshot("second", 2))
    disk.fails_at = ""
    store.prepare()
    assert store.names() == ["first"]
    assert store.read("first")[0].sequence == 1
    save(store, snapshot("second", 2))


def test_a_state_directory_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for path in (file, file / "below"):
        with pytest.raises(InvalidRequest, match=f"--state-dir {path} cannot be used: .*give a directory"):
            LocalFilesystem.create(path)
