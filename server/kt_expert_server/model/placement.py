"""Over which memory nodes weights and threads are split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import kt_expert_native as native

from kt_expert_server.errors import InvalidRequest

AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Placement:
    """`memory_nodes` are ids of the machine's own nodes; empty where weights are only cut, or not even that."""

    nodes: int = 1
    memory_nodes: tuple[int, ...] = ()
    remark: str = ""  # why it is not what the machine would offer

    def engine(self, threads: int, isa: str) -> native.Engine:
        """Raises InvalidRequest for an instruction set or a thread count this machine does not have."""
        try:
            return native.Engine(threads, isa, self.nodes, list(self.memory_nodes))
        except native.NativeError as error:
            raise InvalidRequest(str(error)) from error

    def weights(self, spec: native.LayerSpec, weight_format: str) -> native.LayerWeights:
        return native.LayerWeights(spec, weight_format, self.nodes, list(self.memory_nodes))

    def describe(self) -> str:
        if self.memory_nodes:
            return f"split over memory nodes {', '.join(map(str, self.memory_nodes))}, threads near them"
        where = f"cut into {self.nodes} slices, on no particular memory" if self.nodes > 1 else "on one memory node"
        return where + (f" ({self.remark})" if self.remark else "")


ONE_NODE = Placement()


def choose_placement(asked: str, threads: int, machine: Sequence[tuple[int, Sequence[int]]] | None = None) -> Placement:
    """`asked` is "auto", for all memory nodes of this process, or how many to cut the weights for.

    A number other than the machine's own cuts without placing: results are then those of a machine with that many nodes.
    Raises InvalidRequest for anything else.
    """
    found = [node for node, _ in (native.list_memory_nodes() if machine is None else machine)]
    if asked == AUTO:
        if len(found) > threads:
            return Placement(remark=f"the machine has {len(found)}, more than the {threads} threads")
        return Placement(len(found), tuple(found)) if len(found) > 1 else ONE_NODE
    if not (asked.isascii() and asked.isdigit()) or not 1 <= int(asked) <= native.MAX_MEMORY_NODES:
        raise InvalidRequest(f"--nodes is {asked!r}, expected a number in [1, {native.MAX_MEMORY_NODES}], or {AUTO}")
    count = int(asked)
    return Placement(count, tuple(found) if count == len(found) > 1 else ())
