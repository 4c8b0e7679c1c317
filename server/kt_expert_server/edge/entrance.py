"""Who comes in, and how often: every stream and every control call passes here first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc

from kt_expert_server.edge.auth import Authenticator, Metadata
from kt_expert_server.edge.pace import STRANGERS, Pace
from kt_expert_server.errors import NotAuthenticated, NotPermitted

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True)
class Caller:
    """`identity` owns runs. `paced_as` is who shares a pace: the identity, or without tokens the host it calls from."""

    identity: str
    paced_as: str


class Entrance:
    """Names the caller once it is the caller's turn."""

    def __init__(self, authenticator: Authenticator, pace: Pace) -> None:
        self._authenticator, self.pace = authenticator, pace

    async def trainer(self, context: Context) -> Caller:
        """Whose call that trains it is. Raises NotAuthenticated, NotPermitted or OutOfCapacity."""
        return await self._admit(context, self._authenticator.trainer)

    async def admin(self, context: Context) -> Caller:
        """Whose call that concerns the whole server it is. Raises as trainer()."""
        return await self._admit(context, self._authenticator.admin)

    async def _admit(self, context: Context, authenticate: Callable[[Metadata, str], str]) -> Caller:
        try:
            identity = authenticate(context.invocation_metadata() or (), context.peer())
        except (NotAuthenticated, NotPermitted):
            await self.pace.turn(STRANGERS)
            raise
        caller = Caller(identity, identity or _host_of(context.peer()))
        await self.pace.turn(caller.paced_as)
        return caller


def _host_of(peer: str) -> str:
    """ipv4:192.0.2.1:5000, ipv6:%5B::1%5D:5000 and unix: without their ports."""
    return peer.rpartition(":")[0] if peer.startswith(("ipv4:", "ipv6:")) else peer.partition(":")[0]
