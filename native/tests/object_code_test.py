"""The baseline's object code runs on any x86-64: wide instructions stay in their own kernel files.

Run by ctest with the core's static library. Two ways out are closed: an instruction of a higher ISA in a file that
does not belong to it, and a weak symbol in a kernel file, which the linker might choose as everyone's copy of an inline
function.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

# What a file may hold, by the start of its name; a file that matches none is baseline.
ALLOWED = (
    ("x86_amx", {"vex", "ymm", "zmm", "tmm"}),
    ("x86_avx512", {"vex", "ymm", "zmm"}),
    ("x86_avx2", {"vex", "ymm"}),
)
FOUND = {
    # A VEX or EVEX encoded instruction, whatever its registers; CPUID and XGETBV code has none.
    "vex": re.compile(r"^\s*[0-9a-f]+:\s+(?:\{evex\}\s+)?(v[a-z0-9]+|k(?:mov|or|and|not)[a-z]*)\s", re.MULTILINE),
    "ymm": re.compile(r"%ymm\d"),
    "zmm": re.compile(r"%(?:zmm\d|k[1-7]\b)"),
    "tmm": re.compile(r"%tmm\d|\b(?:ldtilecfg|tilerelease)\b"),
}
NOT_VECTOR = {"verr", "verw", "vmcall"}
# The personality routine's address: data, the same in every file.
HARMLESS_WEAK = {"DW.ref.__gxx_personality_v0"}


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def allowed_in(name: str) -> set[str]:
    return next((allowed for prefix, allowed in ALLOWED if name.startswith(prefix)), set())


def problems_of(path: Path) -> list[str]:
    code = run("objdump", "--disassemble", "--no-show-raw-insn", str(path))
    allowed = allowed_in(path.name)
    problems = []
    for kind, pattern in FOUND.items():
        hits = [hit for hit in pattern.findall(code) if hit not in NOT_VECTOR]
        if kind not in allowed and hits:
            problems.append(f"{path.name}: {len(hits)} uses of {kind} ({hits[0]})")
    if allowed:
        weak = {line.split()[-1] for line in run("nm", str(path)).splitlines() if re.search(r" [WVu] ", line)}
        problems += [f"{path.name}: weak symbol {name}" for name in sorted(weak - HARMLESS_WEAK)]
    return problems


def main() -> int:
    library = Path(sys.argv[1]).resolve()
    with TemporaryDirectory() as directory:
        subprocess.run(["ar", "x", str(library)], check=True, cwd=directory)
        objects = sorted(Path(directory).glob("*.o"))
        problems = [problem for path in objects for problem in problems_of(path)]
    kernels = [path.name for path in objects if allowed_in(path.name)]
    for problem in problems:
        print(problem)
    print(f"{len(objects)} objects, {len(kernels)} of them kernels, {len(problems)} problems")
    return 1 if problems or not kernels else 0


if __name__ == "__main__":
    sys.exit(main())
