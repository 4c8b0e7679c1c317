"""`make emulated`: every kernel runs, here where this CPU has its instructions, emulated where it does not.

Usage: python -m emulated TEST_BINARY CACHE_DIRECTORY
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from emulated import bochs, linux
from emulated.debian import EmulatorError, run

TIMEOUT_S = 1800.0
INIT = Path(__file__).resolve().parent / "init.c"
_KERNEL_LINE = "kernel "
_WITHOUT_SOCKETS = ("--test-suite-exclude=sockets",)  # the kernel has none, and no kernel of ours depends on them


def kernels_in(lines: list[str]) -> set[str]:
    return {line.removeprefix(_KERNEL_LINE).strip() for line in lines if line.startswith(_KERNEL_LINE)}


def run_natively(binary: Path) -> set[str]:
    with TemporaryDirectory() as directory:
        report = Path(directory) / "report"
        done = subprocess.run([binary], check=False, env=os.environ | {"KT_EXPERT_TEST_REPORT": str(report)})
        if done.returncode != 0:
            raise EmulatorError(f"the tests fail on this CPU already: status {done.returncode}")
        return kernels_in(report.read_text(encoding="ascii").splitlines())


def run_emulated(binary: Path, cache: Path, isas: list[str]) -> set[str]:
    cache.mkdir(parents=True, exist_ok=True)
    init = cache / "init"
    run("gcc", "-O2", "-static", "-s", "-Wall", "-Wextra", "-Werror", "-o", init, INIT)
    machine = bochs.Machine(bochs.install(cache), linux.kernel(cache), init)
    environment = {
        "KT_EXPERT_TEST_ISAS": ",".join(isas),
        "KT_EXPERT_TEST_EMULATED": "1",
        "KT_EXPERT_TEST_REPORT": "/proc/self/fd/1",
    }
    lines: list[str] = []

    def on_line(line: str) -> None:
        lines.append(line)
        if not line.startswith(_KERNEL_LINE):
            print(f"  | {line}", flush=True)

    begun = time.monotonic()
    status = machine.boot(bochs.Program(binary, _WITHOUT_SOCKETS, environment), on_line, TIMEOUT_S)
    print(f"emulated {', '.join(isas)}: status {status} after {time.monotonic() - begun:.0f} s")
    if status != 0:
        raise EmulatorError(f"the tests fail under the emulator: status {status}")
    return kernels_in(lines)


def main() -> int:
    binary, cache = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    every = kernels_in(run(binary, "--list-kernels").splitlines())
    try:
        native = run_natively(binary)
        isas = sorted({kernel.split("/")[0] for kernel in every - native})
        emulated = run_emulated(binary, cache, isas) - native if isas else set()
    except EmulatorError as error:
        print(f"emulated: {error}", file=sys.stderr)
        return 1
    left = every - native - emulated
    for kernel in sorted(left):
        print(f"not run: {kernel}")
    print(f"kernels: native {len(native)}, emulated {len(emulated)}, not run {len(left)}")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
