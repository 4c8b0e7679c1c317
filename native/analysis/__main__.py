"""python -m analysis BUILD_DIR: inner loops beside their bounds; ends with 1 where one that matters is far below."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from analysis.amx import PANEL_DEPTH, tile_accounts
from analysis.disassembly import Loop, functions, innermost_loops
from analysis.mca import MULTIPLIES, predict

LEAST_FRACTION = 0.85
_LEAST_MULTIPLIES = 8
# Object file, the processor it is judged on, and what multiplies.
_VECTOR_FILES = (
    ("x86_avx2", "znver3", "vfmadd"),
    ("x86_avx2_weights", "znver3", "vfmadd"),
    ("x86_avx512", "icelake-server", "vfmadd"),
    ("x86_avx512", "sapphirerapids", "vfmadd"),
    ("x86_avx512_weights", "sapphirerapids", "vfmadd"),
    ("x86_avx512_bf16", "sapphirerapids", "vdpbf16ps"),
    ("x86_avx512_vnni", "sapphirerapids", "vpdpbusd"),
)
# The loops in which many rows spend their time: each file that has one has one of these.
_MAIN = ("multiply_panels", "panel_tile", "grouped_multiply", "grouped_panel_tile", "tile", "multiply")
_TILE_FILES = (("x86_amx_bf16", "tdpbf16ps"), ("x86_amx_int8", "tdpbssd"))


def main(build: Path) -> int:
    short = [*_print_vector_loops(build), *_print_tile_loops(build)]
    for line in short:
        print(f"BELOW {LEAST_FRACTION}: {line}")
    return 1 if short else 0


def _print_vector_loops(build: Path) -> list[str]:
    short = []
    print("cycles of one pass by llvm-mca, the share of its busiest unit's, and of its multiplications' alone")
    print(f"{'file':19} {'processor':15} {'multiplies':>10} {'others':>6} {'cycles':>7} {'unit':>5} {'multiply':>8}  function")
    for name, cpu, multiply in _VECTOR_FILES:
        found = False
        for function, loop in _best_loops(_object(build, name), multiply).items():
            prediction, multiplies = predict(loop, cpu), loop.count(*MULTIPLIES)
            print(
                f"{name:19} {cpu:15} {multiplies:10} {len(loop.body) - multiplies:6} {prediction.cycles:7.1f} "
                f"{prediction.of_resource_bound:5.2f} {prediction.of_multiply_bound:8.2f}  {function}"
            )
            found = found or function in _MAIN
            if function in _MAIN and prediction.of_resource_bound < LEAST_FRACTION:
                short.append(f"{name} {function} on {cpu}: {prediction.of_resource_bound:.2f} of llvm-mca's bound")
        if not found:
            short.append(f"{name}: none of its loops is one of {', '.join(_MAIN)}; was it renamed?")
    return short


def _print_tile_loops(build: Path) -> list[str]:
    short = []
    print(f"\ntile instructions in the loop and around it, and the multiplication unit's utilisation over K = {PANEL_DEPTH}")
    print(f"{'file':19} {'TDP':>4} {'loads':>5} {'others':>6} | {'loads':>5} {'stores':>6} {'scaling':>7} | utilisation")
    for name, multiply in _TILE_FILES:
        accounts = tile_accounts(functions(_object(build, name)), multiply)
        for account in accounts:
            print(
                f"{name:19} {account.multiplies:4} {account.loads:5} {account.others:6} | {account.prologue_loads:5} "
                f"{account.epilogue_stores:6} {account.scaling_instructions:7} | {account.utilisation:.2f}"
            )
        if not accounts or accounts[0].utilisation < LEAST_FRACTION:
            short.append(f"{name}: its main loop keeps the multiplication unit busy for less than that")
    return short


def _object(build: Path, name: str) -> Path:
    pattern = f"CMakeFiles/*/src/gemm/{name}.cc.o"
    found = next(build.glob(pattern), None)
    if found is None:
        sys.exit(f"{build} has no {pattern}; build the native tests first")
    return found


def _best_loops(path: Path, multiply: str) -> dict[str, Loop]:
    """By function without its template arguments: of all instances, the loop with the most multiplications."""
    best: dict[str, Loop] = {}
    for name, code in functions(path).items():
        base = _base_name(name)
        for loop in innermost_loops(name, code):
            known = best.get(base)
            enough = loop.count(multiply) >= _LEAST_MULTIPLIES
            if enough and (known is None or loop.count(multiply) > known.count(multiply)):
                best[base] = loop
    return best


def _base_name(function: str) -> str:
    plain = function.replace("(anonymous namespace)::", "").replace("kt_expert::", "")
    return re.split(r"[<(]", plain)[0].split()[-1]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m analysis BUILD_DIR")
    sys.exit(main(Path(sys.argv[1])))
