"""How much of the server's memory and disk one identity may take, over all of its runs."""

from __future__ import annotations

from collections.abc import Mapping

from kt_expert_server.engine.kinds import Kind
from kt_expert_server.errors import OverQuota
from kt_expert_server.model.memory_plan import format_bytes

CHECKPOINTS = "checkpoints"  # bytes on the disk, which are counted where they are written
# What a quota bounds -> the reservations it counts.
_COUNTED: dict[str, tuple[Kind, ...]] = {
    "tickets": (Kind.TICKETS,),
    "queue": (Kind.REQUESTS, Kind.OUTCOMES),
    "adapters": (Kind.ADAPTERS, Kind.GRADIENTS, Kind.OPTIMIZER),
}
QUOTAS = (*_COUNTED, CHECKPOINTS)
_NAME_OF = {kind: name for name, kinds in _COUNTED.items() for kind in kinds}


class Quotas:
    """Bytes by identity and by what they are for. Limits of the same names; what has none is not bounded."""

    def __init__(self, limits: Mapping[str, int]) -> None:
        self.limits = dict(limits)
        self._identities: dict[str, str] = {}  # owners of reservations, which are runs -> whose runs they are
        self._used: dict[tuple[str, str], int] = {}

    def belongs(self, owner: str, identity: str) -> None:
        """What that owner reserves from now on counts for the identity."""
        self._identities[owner] = identity

    def forget(self, owner: str) -> None:
        """The run has ended. What it has not given back yet still counts."""
        self._identities.pop(owner, None)

    def identity_of(self, owner: str) -> str | None:
        return self._identities.get(owner)

    def require(self, kind: Kind, size_bytes: int, owner: str, what: str) -> None:
        """Raises OverQuota where it would be too much."""
        name, identity = _NAME_OF.get(kind), self._identities.get(owner)
        if name is not None and identity is not None:
            self._require(name, identity, self._used.get((name, identity), 0), size_bytes, what)

    def require_disk(self, identity: str, used_bytes: int, size_bytes: int, what: str) -> None:
        """As require(), for a checkpoint beside others that take `used_bytes`."""
        self._require(CHECKPOINTS, identity, used_bytes, size_bytes, what)

    def count(self, kind: Kind, size_bytes: int, identity: str | None) -> None:
        """Reserved, or given back where negative."""
        name = _NAME_OF.get(kind)
        if name is None or identity is None:
            return
        used = self._used.get((name, identity), 0) + size_bytes
        assert used >= 0, (name, identity)  # noqa: S101
        self._used[name, identity] = used
        if not used:
            del self._used[name, identity]

    def _require(self, name: str, identity: str, used_bytes: int, size_bytes: int, what: str) -> None:
        limit = self.limits.get(name)
        if limit is not None and used_bytes + size_bytes > limit:
            who = f"identity {identity!r}" if identity else "all trainers together"
            raise OverQuota(
                f"{what} needs {format_bytes(size_bytes)}; {who} may have {format_bytes(limit)} of {name} and has "
                f"{format_bytes(used_bytes)}; {_ADVICE[name]}",
                missing_bytes=used_bytes + size_bytes - limit if size_bytes <= limit else 0,
            )


_ADVICE = {
    "tickets": "run backward for what was forwarded, or send fewer tokens at once",
    "queue": "send fewer tokens at once, or acknowledge outcomes earlier",
    "adapters": "close runs that have ended (kt-expert runs ls, close), or train a smaller adapter",
    CHECKPOINTS: "remove old ones (kt-expert checkpoint rm)",
}
