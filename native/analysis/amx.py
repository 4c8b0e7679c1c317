"""Tile loops, which llvm-mca has no figures for: what their instructions cost by the published ones.

Loads, multiplications and stores go to units of their own and overlap inside the loop. What comes before and after it is
counted as if nothing overlapped: loading the accumulators, waiting for the last multiplication, storing them, and, for
integers, the vector loop that scales the sums.
"""

from __future__ import annotations

from dataclasses import dataclass

from analysis.disassembly import Instruction, Loop, innermost_loops

# Intel's optimisation manual and uops.info, in cycles.
MULTIPLY_CYCLES = 16  # between two TDP*
MULTIPLY_LATENCY = 52
LOAD_CYCLES = 8  # between two TILELOADD from the first-level cache
STORE_CYCLES = 16  # between two TILESTORED
ISSUED_PER_CYCLE = 6
SCALED_PER_CYCLE = 4  # of the vector loop after integer products, on the safe side

PANEL_DEPTH = 2048
DEPTH_OF = {"tdpbf16ps": 32, "tdpbssd": 64}
_TILE_COLUMNS = 16
_TILE_ROWS = 16


@dataclass(frozen=True, slots=True)
class Account:
    """One block of outputs over a panel of PANEL_DEPTH."""

    multiply: str
    multiplies: int  # in the loop, as the next three
    loads: int
    stores: int
    others: int
    prologue_loads: int
    epilogue_stores: int
    scaling_instructions: int  # over the whole block
    cycles: float

    @property
    def utilisation(self) -> float:
        """Of the multiplication unit."""
        steps = PANEL_DEPTH // DEPTH_OF[self.multiply]
        return steps * self.multiplies * MULTIPLY_CYCLES / self.cycles


def account(code: list[Instruction], loop: Loop, multiply: str, scaling: Loop | None) -> Account:
    """`scaling` is the vector loop that adds a tile row's sixteen sums to C, where there is one."""
    multiplies, loads, stores = loop.count("tdp"), loop.count("tileload"), loop.count("tilestored")
    others = len(loop.body) - multiplies - loads - stores
    positions = {each.address: place for place, each in enumerate(code)}
    before = code[: positions[loop.body[0].address]]
    after = code[positions[loop.body[-1].address] + 1 :]
    prologue = _run(list(reversed(before)), ("tileload", "tilezero"))
    epilogue = _run(after, ("tilestored",))
    prologue_loads = sum(each.mnemonic.startswith("tileload") for each in prologue)
    rows_of_sums = len(epilogue) * _TILE_ROWS
    scaled = len(scaling.body) * rows_of_sums if scaling is not None else 0
    step = max(
        multiplies * MULTIPLY_CYCLES,
        loads * LOAD_CYCLES,
        stores * STORE_CYCLES,
        len(loop.body) / ISSUED_PER_CYCLE,
        MULTIPLY_LATENCY,  # every accumulator is added to once a step, and waits for the last time
    )
    cycles = (
        prologue_loads * LOAD_CYCLES
        + PANEL_DEPTH // DEPTH_OF[multiply] * step
        + MULTIPLY_LATENCY
        + len(epilogue) * STORE_CYCLES
        + scaled / SCALED_PER_CYCLE
    )
    return Account(multiply, multiplies, loads, stores, others, prologue_loads, len(epilogue), scaled, cycles)


def tile_accounts(functions: dict[str, list[Instruction]], multiply: str) -> list[Account]:
    """Of every tile loop of a file that works on memory, most multiplications first."""
    loops = [(code, loop) for name, code in functions.items() for loop in innermost_loops(name, code)]
    scaling = next((loop for _, loop in loops if loop.count("vcvtdq2ps") and not loop.count("tdp")), None)
    found = [account(code, loop, multiply, scaling) for code, loop in loops if loop.count(multiply) and loop.count("tileload")]
    return sorted(found, key=lambda each: (-each.multiplies, each.loads))


def _run(code: list[Instruction], wanted: tuple[str, ...]) -> list[Instruction]:
    """The wanted instructions up to the next other tile instruction."""
    found = []
    for instruction in code:
        if instruction.mnemonic.startswith(wanted):
            found.append(instruction)
        elif instruction.mnemonic.startswith(("tile", "tdp", "ldtilecfg")):
            break
    return found
