"""Who comes in, and how often: every stream and every control call passes here first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc

from kt_expert_server.edge.auth import Authenticator, Metadata
from kt_expert_server.edge.pace import Pace
from kt_expert_server.errors import NotAuthenticated, NotPermitted

Context = grpc.aio.ServicerContext[Any, Any]
_NOBODY_KNOWN = None  # all who failed to name an identity share one pace


class Entrance:
    """Names the caller's identity once it is the caller's turn."""

    def __init__(self, authenticator: Authenticator, pace: Pace) -> None:
        self._authenticator, self.pace = authenticator, pace

    async def trainer(self, context: Context) -> str:
        """The identity of a call that trains. Raises NotAuthenticated, NotPermitted or OutOfCapacity."""
        return await self._admit(context, self._authenticator.trainer)

    async def admin(self, context: Context) -> str:
        """The identity of a call that concerns the whole server. Raises as trainer()."""
        return await self._admit(context, self._authenticator.admin)

    async def _admit(self, context: Context, authenticate: Callable[[Metadata, str], str]) -> str:
        try:
            identity = authenticate(context.invocation_metadata() or (), context.peer())
        except (NotAuthenticated, NotPermitted):
            await self.pace.turn(_NOBODY_KNOWN)
            raise
        await self.pace.turn(identity)
        return identity
