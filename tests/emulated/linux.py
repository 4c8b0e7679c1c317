"""The emulated machine's kernel: Debian's Linux 6.1 source, one patch, and a configuration of little more than nothing."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

from emulated.debian import Archive, EmulatorError, require_tools, run

HERE = Path(__file__).resolve().parent
PATCH = HERE / "linux-6.1-unsaved-tiles.patch"
CONFIG = HERE / "linux.config"
SUITE = "bookworm"
PACKAGE = "linux-source-6.1"
TOOLS = ("flex", "bison", "bc", "xz", "patch", "gcc", "make")
# Sources never compiled here, and half of the tree.
UNUSED = tuple(f"*/{part}/*.[ch]" for part in ("drivers/gpu", "drivers/media", "drivers/net", "drivers/staging", "sound"))


def kernel(cache: Path) -> Path:
    """Path of a bzImage, built on first use: about five minutes on two cores."""
    require_tools(*TOOLS)
    archive = Archive(cache, SUITE)
    ingredients = [archive.version(PACKAGE).encode(), PATCH.read_bytes(), CONFIG.read_bytes()]
    image = cache / f"linux-{hashlib.sha256(b'|'.join(ingredients)).hexdigest()[:16]}"
    if not image.exists():
        tree = cache / "linux-source"
        _unpack(archive.download(PACKAGE)[0], tree)
        _build(tree, image)
        shutil.rmtree(tree)
    return image


def _unpack(package: Path, tree: Path) -> None:
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir()
    excluded = [f"--exclude={pattern}" for pattern in UNUSED]
    members = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE)
    source = subprocess.Popen(["tar", "-xO", f"./usr/src/{PACKAGE}.tar.xz"], stdin=members.stdout, stdout=subprocess.PIPE)
    unpacked = subprocess.run(["tar", "-xJ", "--strip-components=1", *excluded], stdin=source.stdout, cwd=tree, check=False)
    if unpacked.returncode != 0 or source.wait() != 0 or members.wait() != 0:
        raise EmulatorError(f"{package.name} could not be unpacked")


def _build(tree: Path, image: Path) -> None:
    run("patch", "--strip=1", "--input", PATCH, cwd=tree)
    run("make", "-s", "tinyconfig", cwd=tree)
    run("scripts/kconfig/merge_config.sh", "-m", ".config", CONFIG, cwd=tree)
    run("make", "-s", "olddefconfig", cwd=tree)
    chosen = (tree / ".config").read_text(encoding="ascii").splitlines()
    refused = [line for line in CONFIG.read_text(encoding="ascii").splitlines() if line.endswith("=y") and line not in chosen]
    if refused:
        raise EmulatorError(f"the kernel's configuration does not take {', '.join(refused)}")
    run("make", "-s", f"-j{os.cpu_count()}", "bzImage", cwd=tree)
    shutil.copy(tree / "arch/x86/boot/bzImage", image)
