"""Functions and innermost loops of an object file, from objdump's listing."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

_FUNCTION = re.compile(r"^[0-9a-f]+ <(.+)>:$")
_INSTRUCTION = re.compile(r"^\s*([0-9a-f]+):\t(.+?)\s*$")
_JUMP = re.compile(r"^(j[a-z]+)\s+([0-9a-f]+)")
_SYMBOL = re.compile(r"\s*<[^>]*>")
_COMMENT = re.compile(r"\s*#.*")


@dataclass(frozen=True, slots=True)
class Instruction:
    address: int
    text: str  # AT&T syntax, without symbols

    @property
    def mnemonic(self) -> str:
        return self.text.split()[0]

    @property
    def target(self) -> int | None:
        """Where a jump goes; None for anything else."""
        match = _JUMP.match(self.text)
        return int(match[2], 16) if match else None


@dataclass(frozen=True, slots=True)
class Loop:
    """Instructions from a jump's target to the jump, none of which jumps back itself."""

    function: str
    body: tuple[Instruction, ...]

    def count(self, *prefixes: str) -> int:
        return sum(instruction.mnemonic.startswith(prefixes) for instruction in self.body)


def functions(path: Path) -> dict[str, list[Instruction]]:
    """By demangled name. Raises CalledProcessError for a file objdump cannot read."""
    listing = subprocess.run(
        ["objdump", "--disassemble", "--no-show-raw-insn", "--demangle", "--wide", str(path)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in listing.splitlines():
        if match := _FUNCTION.match(line):
            current = found.setdefault(match[1], [])
        elif match := _INSTRUCTION.match(line):
            current.append(Instruction(int(match[1], 16), _COMMENT.sub("", _SYMBOL.sub("", match[2])).strip()))
    return found


def innermost_loops(name: str, code: list[Instruction]) -> list[Loop]:
    """Every backward jump with no other backward jump inside."""
    index = {instruction.address: position for position, instruction in enumerate(code)}
    spans = []
    for position, instruction in enumerate(code):
        target = instruction.target
        if target is not None and target <= instruction.address and target in index:
            spans.append((index[target], position))
    inner = [span for span in spans if not any(span[0] <= a and b <= span[1] and (a, b) != span for a, b in spans)]
    return [Loop(name, tuple(code[first : last + 1])) for first, last in inner]
