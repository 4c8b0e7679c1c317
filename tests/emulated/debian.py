"""Debian packages without installing them: downloaded by apt into a directory of its own and unpacked. Needs no root."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


class EmulatorError(RuntimeError):
    """The emulated machine could not be made or did not finish; the message says at which step."""


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """Standard output of a command. Raises EmulatorError with what it said on failure."""
    done = subprocess.run([str(part) for part in command], check=False, cwd=cwd, capture_output=True, text=True)
    if done.returncode != 0:
        tail = (done.stdout + done.stderr)[-2000:]
        raise EmulatorError(f"{' '.join(str(part) for part in command[:4])} ... failed with {done.returncode}:\n{tail}")
    return done.stdout


def require_tools(*names: str) -> None:
    missing = [name for name in names if shutil.which(name) is None]
    if missing:
        raise EmulatorError(f"missing programs: {', '.join(missing)}; `make system-packages` installs them")


def mirror() -> str:
    """The mirror this machine's own apt uses for Debian's main archive."""
    for line in run("apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages").splitlines():
        if re.search(r"/debian/*$", line):
            return line
    raise EmulatorError("apt knows no Debian mirror; add one to /etc/apt/sources.list")


class Archive:
    """One suite of Debian as seen by an apt with no connection to the host's packages."""

    def __init__(self, directory: Path, suite: str) -> None:
        self._root = directory / f"apt-{suite}"
        for name in ("etc/apt/apt.conf.d", "etc/apt/preferences.d", "lists/partial", "cache/archives/partial"):
            (self._root / name).mkdir(parents=True, exist_ok=True)
        (self._root / "status").touch()
        source = f"deb [arch=amd64 signed-by={KEYRING}] {mirror()} {suite} main\n"
        (self._root / "etc/apt/sources.list").write_text(source, encoding="ascii")
        options = {
            "Dir::Etc": self._root / "etc/apt",
            "Dir::State::lists": self._root / "lists",
            "Dir::State::status": self._root / "status",
            "Dir::Cache": self._root / "cache",
            "Acquire::Languages": "none",
            "APT::Architecture": "amd64",
            "APT::Architectures": "amd64",
            "APT::Sandbox::User": "",
        }
        self._options = [part for name, value in options.items() for part in ("-o", f"{name}={value}")]
        run("apt-get", "--quiet=2", *self._options, "update")

    def version(self, package: str) -> str:
        shown = run("apt-cache", *self._options, "show", "--no-all-versions", package)
        return re.search(r"^Version: (.+)$", shown, re.MULTILINE)[1]  # type: ignore[index]  # every package has one

    def download(self, *packages: str) -> list[Path]:
        target = self._root / "downloads"
        target.mkdir(exist_ok=True)
        run("apt-get", "--quiet=2", *self._options, "download", *packages, cwd=target)
        return [sorted(target.glob(f"{package}_*.deb"))[-1] for package in packages]

    def unpack(self, root: Path, *packages: str) -> None:
        for path in self.download(*packages):
            run("dpkg-deb", "--extract", path, root)
