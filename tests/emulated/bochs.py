"""Debian trixie's Bochs, unpacked beside the host's packages, and one boot of it."""

from __future__ import annotations

import io
import re
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pycdlib

from emulated.debian import Archive, EmulatorError, require_tools, run

SUITE = "trixie"  # the first with Bochs 3, whose Sapphire Rapids model has AMX
PACKAGES = (
    *("bochs", "bochsbios", "vgabios", "isolinux", "syslinux-common"),
    *("libc6", "libgcc-s1", "libstdc++6", "libltdl7", "libsamplerate0", "libreadline8t64", "libtinfo6"),
)
# bochs-bin is linked with GTK for a debugger's window that is never opened: empty libraries with the names it asks for
# take the place of 50 MB of packages.
STUBBED = ("libgtk-3.so.0", "libgdk-3.so.0", "libpango-1.0.so.0", "libgobject-2.0.so.0", "libglib-2.0.so.0")
STUBBED_NAMES = re.compile(r"\s(?:FUNC|NOTYPE)\s+GLOBAL\s+DEFAULT\s+UND\s+((?:gtk|gdk|g|pango)_\w+)")
LIBRARIES = Path("usr/lib/x86_64-linux-gnu")

MEMORY_MIB = 512
INSTRUCTIONS_PER_SECOND = 50_000_000  # of the guest's clock, which is virtual
# Features of the CPU model that Linux would switch on and Bochs or tinyconfig does not carry.
EXCLUDED_FEATURES = "cet,uintr,la57,pks,vmx"
# 580 is FSRM: Linux drops ERMS on this model but keeps FSRM, and memmove then overruns.
KERNEL_OPTIONS = (
    f"console=ttyS0,115200 quiet nokaslr acpi=off mitigations=off panic=-1 clearcpuid=580 rdinit=/init "
    f"random.trust_cpu=on tsc_early_khz={INSTRUCTIONS_PER_SECOND // 1000}"
)
BEGIN, END = b"@@begin", re.compile(rb"@@end (\d+)")


def install(cache: Path) -> Path:
    """Root of an unpacked Bochs, fetched on first use (8 MB)."""
    require_tools("dpkg-deb", "readelf", "gcc")
    archive = Archive(cache, SUITE)
    root = cache / f"bochs-{archive.version('bochs')}"
    if not (root / "complete").exists():
        root.mkdir(exist_ok=True)
        archive.unpack(root, *PACKAGES)
        _stub_window_libraries(root)
        (root / "complete").touch()
    return root


def _stub_window_libraries(root: Path) -> None:
    symbols = run("readelf", "--wide", "--dyn-syms", root / "usr/bin/bochs-bin")
    names = sorted(set(STUBBED_NAMES.findall(symbols)))
    source = "".join(f"void {name}(void) {{ __builtin_trap(); }}\n" for name in names)
    for library in STUBBED:
        text = source if library == STUBBED[0] else ""
        code = root / f"{library}.c"
        code.write_text(text, encoding="ascii")
        flags = ("-w", "-shared", "-fPIC", "-nostdlib", "-ffreestanding", "-fno-builtin", f"-Wl,-soname,{library}")
        run("gcc", *flags, "-o", root / LIBRARIES / library, code)


@dataclass(frozen=True)
class Program:
    """A static executable for the guest."""

    path: Path
    arguments: Sequence[str] = ()
    environment: Mapping[str, str] | None = None


class Machine:
    """One emulated computer. `boot` may be called any number of times."""

    def __init__(self, root: Path, kernel: Path, init: Path) -> None:
        self._root = root
        self._kernel = kernel
        self._init = init

    def boot(self, program: Program, on_line: Callable[[str], None], timeout_s: float) -> int:
        """Runs the program to its end and returns its exit status; `on_line` gets its output as it comes.

        Raises EmulatorError where the machine stops before the program does, or after `timeout_s`.
        """
        with TemporaryDirectory(prefix="kt-expert-emulated-") as name:
            directory = Path(name)
            self._write_disc(directory / "boot.iso", program)
            (directory / "bochsrc").write_text(self._configuration(directory), encoding="ascii")
            return self._run(directory, on_line, timeout_s)

    def _write_disc(self, path: Path, program: Program) -> None:
        syslinux = self._root / "usr/lib"
        menu = f"DEFAULT test\nPROMPT 0\nLABEL test\n KERNEL /kernel\n INITRD /initrd\n APPEND {KERNEL_OPTIONS}\n"
        command = "\n".join(("/program", *program.arguments)) + "\n"
        environment = "".join(f"{name}={value}\n" for name, value in (program.environment or {}).items())
        initrd = cpio(
            {
                "init": (0o100755, self._init.read_bytes()),
                "program": (0o100755, program.path.read_bytes()),
                "command": (0o100644, command.encode()),
                "environment": (0o100644, environment.encode()),
            }
        )
        disc = pycdlib.PyCdlib()
        disc.new(interchange_level=4)
        disc.add_directory("/isolinux")
        files = {
            "/isolinux/isolinux.bin": (syslinux / "ISOLINUX/isolinux.bin").read_bytes(),
            "/isolinux/ldlinux.c32": (syslinux / "syslinux/modules/bios/ldlinux.c32").read_bytes(),
            "/isolinux/isolinux.cfg": menu.encode(),
            "/kernel": self._kernel.read_bytes(),
            "/initrd": initrd,
        }
        for name, data in files.items():
            disc.add_fp(io.BytesIO(data), len(data), name)
        disc.add_eltorito("/isolinux/isolinux.bin", "/boot.cat", boot_load_size=4, boot_info_table=True)
        disc.write(str(path))
        disc.close()

    def _configuration(self, directory: Path) -> str:
        share = self._root / "usr/share"
        lines = (
            "plugin_ctrl: unmapped=1, biosdev=1, speaker=0, parallel=0, gameport=0, iodebug=0, serial=1",
            "config_interface: textconfig",
            'display_library: rfb, options="timeout=0"',
            f"memory: guest={MEMORY_MIB}, host={MEMORY_MIB}",
            f'romimage: file="{share}/bochs/BIOS-bochs-latest", options=fastboot',
            f'vgaromimage: file="{share}/vgabios/vgabios.bin"',
            f"cpu: model=sapphire_rapids, count=1, ips={INSTRUCTIONS_PER_SECOND}, reset_on_triple_fault=0, "
            f'ignore_bad_msrs=1, exclude_features="{EXCLUDED_FEATURES}"',
            "ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14",
            f'ata0-master: type=cdrom, path="{directory}/boot.iso", status=inserted',
            "boot: cdrom",
            f'com1: enabled=1, mode=file, dev="{directory}/serial.txt"',
            "port_e9_hack: enabled=1",
            "clock: sync=none, time0=utc",
            f'log: "{directory}/bochs.log"',
            "panic: action=fatal",
            "error: action=report",
            "info: action=report",
            "debug: action=ignore",
            "mouse: enabled=0",
        )
        return "\n".join(lines) + "\n"

    def _command(self, directory: Path) -> list[str]:
        libraries = self._root / LIBRARIES
        loader = [str(libraries / "ld-linux-x86-64.so.2"), "--library-path", f"{libraries}:{libraries / 'pulseaudio'}"]
        bochs = [str(self._root / "usr/bin/bochs-bin"), "-q", "-f", str(directory / "bochsrc")]
        # Bochs' display listens on a port without a password: a network of its own, where the host allows one.
        alone = ["unshare", "--net", "--map-root-user"]
        allowed = subprocess.run([*alone, "true"], check=False, capture_output=True).returncode == 0
        return [*(alone if allowed else []), *loader, *bochs]

    def _run(self, directory: Path, on_line: Callable[[str], None], timeout_s: float) -> int:
        environment = {
            "BXSHARE": str(self._root / "usr/share/bochs"),
            "LTDL_LIBRARY_PATH": str(self._root / LIBRARIES / "bochs/plugins"),
            "TERM": "dumb",
        }
        with (directory / "stderr.txt").open("wb") as errors:
            process = subprocess.Popen(
                self._command(directory), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, env=environment
            )
            timer = threading.Timer(timeout_s, process.kill)
            timer.start()
            try:
                status = _relay(process, on_line)
            finally:
                timer.cancel()
                process.kill()
                process.wait()
        if status is None:
            logs = [(directory / name) for name in ("serial.txt", "stderr.txt", "bochs.log")]
            tails = "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-1500:]}" for log in logs if log.exists())
            raise EmulatorError(f"the emulated machine stopped before its program did, or ran past {timeout_s} s\n{tails}")
        return status


def _relay(process: subprocess.Popen[bytes], on_line: Callable[[str], None]) -> int | None:
    begun = False
    for line in process.stdout or ():
        ended = END.match(line)
        if ended is not None:
            return int(ended[1])
        if begun:
            on_line(line.decode(errors="replace").rstrip("\n"))
        begun = begun or line.strip() == BEGIN
    return None


def cpio(files: Mapping[str, tuple[int, bytes]]) -> bytes:
    """An archive of `newc` format (Linux, Documentation/driver-api/early-userspace/buffer-format.rst)."""
    archive = bytearray()
    entries = [*files.items(), ("TRAILER!!!", (0, b""))]
    for inode, (name, (mode, data)) in enumerate(entries, start=1):
        path = name.encode() + b"\0"
        fields = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(path), 0)
        archive += b"070701" + b"".join(b"%08X" % field for field in fields) + path
        archive += bytes(-len(archive) % 4)
        archive += data
        archive += bytes(-len(archive) % 4)
    return bytes(archive)
