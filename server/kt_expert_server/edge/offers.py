"""Connections that the server has offered over gRPC, and that nobody has made yet."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

from kt_expert_proto.handshake import MAGIC_BYTES, OFFER_ID_BYTES, SECRET_BYTES

from kt_expert_server.edge.entrance import Caller
from kt_expert_server.errors import NotAuthenticated

_OFFER_S = 30.0  # how long an offer is good: a trainer connects at once
_MOST_OFFERS_OF_ONE = 16  # that are open, of one caller; a further one takes the place of the oldest
_MOST_OFFERS = 4096  # of all callers; each takes a few hundred bytes


@dataclass(frozen=True, slots=True)
class Offer:
    """One connection that one caller may make."""

    offer_id: bytes
    secret: bytes
    caller: Caller
    until: float


class Offers:
    """Those of one listener."""

    def __init__(self, magic: bytes, clock: Callable[[], float] = time.monotonic) -> None:
        """`magic` is what greetings to that listener begin with."""
        self._magic, self._clock = magic, clock
        self._open: dict[bytes, Offer] = {}

    def make(self, caller: Caller) -> Offer:
        """Older ones give way where too many are open: nobody can keep others from getting theirs."""
        now = self._clock()
        self._open = {key: each for key, each in self._open.items() if each.until > now}
        own = [key for key, each in self._open.items() if each.caller == caller]
        if len(own) >= _MOST_OFFERS_OF_ONE:
            del self._open[own[0]]
        elif len(self._open) >= _MOST_OFFERS:
            del self._open[next(iter(self._open))]
        made = Offer(secrets.token_bytes(OFFER_ID_BYTES), secrets.token_bytes(SECRET_BYTES), caller, now + _OFFER_S)
        self._open[made.offer_id] = made
        return made

    def take(self, greeting: bytes) -> Offer:
        """The offer that a greeting is about, which is not open any more then. Raises NotAuthenticated."""
        offer = self._open.pop(greeting[MAGIC_BYTES : MAGIC_BYTES + OFFER_ID_BYTES], None)
        if not greeting.startswith(self._magic) or offer is None or self._clock() >= offer.until:
            raise NotAuthenticated("this connection was not offered, or not lately; ask for another offer")
        return offer
