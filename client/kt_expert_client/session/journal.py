"""What the server's state holds of this trainer's requests, and, where replay is on, the requests themselves.

A server that is killed begins anew from its last checkpoint. The journal says whether that loses anything of this trainer, and
has what is needed to repeat it: every request since then that changed the state.
"""

from __future__ import annotations

from collections.abc import Iterable

from kt_expert_proto.header import Op

from kt_expert_client.session.calls import Call

_WINDOW = (Op.FORWARD, Op.BACKWARD)


class Journal:
    """Of settled requests, in the order of their ids. `limit_bytes` 0: nothing is kept, and a loss is a loss."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._entries: dict[int, Call] = {}
        self._consumers: dict[int, int] = {}  # forward -> the backward that consumed its ticket
        self._size_bytes = 0
        self._gone_through = 0  # requests up to here are not kept any more, and not durable either
        self._durable = 0  # the server has said that requests up to here survive its death
        self._anchor = 0  # the last request that changed the adapter, its moments or the step
        self._has_gradients = False  # backwards after the anchor count
        self.tickets: set[int] = set()  # forwards whose tickets are wanted
        self._of_adapter: set[int] = set()  # those of them that are of no use once the adapter has changed

    @property
    def is_on(self) -> bool:
        return self._limit_bytes > 0

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    @property
    def overflowed(self) -> bool:
        """More came since the last checkpoint than may be kept."""
        return self.is_on and self._gone_through > 0

    def keeps(self, call: Call) -> bool:
        """It may yet be repeated."""
        return call.request_id in self._entries

    def settled(self, call: Call) -> None:
        """A request has succeeded. It may be kept: its tensors are needed until on_unneeded is called."""
        if call.keeps_ticket:
            self.tickets.add(call.request_id)
            if call.opened.forward.use_adapter:
                self._of_adapter.add(call.request_id)
        if call.op is Op.BACKWARD:
            if call.opened.backward.begin_window:
                self._forget_window()
            self._has_gradients = True
            self._forget_ticket(call.ticket)
            if call.ticket in self._entries:
                self._consumers[call.ticket] = call.request_id
        elif call.op is Op.ZERO_GRAD:
            self._forget_window()
            self._has_gradients = False
            call.on_unneeded(call)
            return
        elif call.changes_state and call.op is not Op.FORWARD:
            self._anchor, self._has_gradients = call.request_id, False
        if not call.changes_state or not self.is_on:
            call.on_unneeded(call)
            return
        self._entries[call.request_id] = call
        self._size_bytes += call.size_bytes
        if self._size_bytes > self._limit_bytes:
            self._gone_through = call.request_id
            self._drop(list(self._entries))

    def released(self, ticket: int) -> None:
        """The ticket will not be consumed: its forward needs no repetition."""
        if ticket in self.tickets:
            self._forget_ticket(ticket)
            self._drop([ticket])

    def durable(self, through: int) -> None:
        """Requests up to there survive the server's death. A ticket does not: its forward is kept while a backward that does
        not survive needs it."""
        self._durable = max(self._durable, through)
        if self._gone_through <= through:
            self._gone_through = 0
        needed = self.tickets | {forward for forward, backward in self._consumers.items() if backward > through}
        self._drop(each for each in list(self._entries) if each <= through and each not in needed)

    def lost(self, included: int) -> bool:
        """Whether a server that has only this trainer's requests up to `included`, and none of its tickets and gradients,
        lacks something."""
        valid = any(ticket > self._anchor or ticket not in self._of_adapter for ticket in self.tickets)
        return self._anchor > included or self._has_gradients or valid

    def can_repeat(self, included: int) -> bool:
        # What was durable is not kept. A server that has lost it all the same cannot be brought back.
        return self.is_on and max(self._gone_through, self._durable) <= included

    def to_repeat(self, included: int) -> list[Call]:
        """What brings such a server to where this trainer is, in order."""
        return [
            call
            for request_id, call in sorted(self._entries.items())
            # With an adapter, an older ticket is stale: the adapter has changed since.
            if request_id > included or (call.op is Op.FORWARD and not call.opened.forward.use_adapter)
        ]

    def clear(self) -> None:
        self._drop(list(self._entries))
        self.tickets.clear()
        self._of_adapter.clear()

    def _forget_ticket(self, ticket: int) -> None:
        self.tickets.discard(ticket)
        self._of_adapter.discard(ticket)

    def _forget_window(self) -> None:
        """Backwards since the anchor count no longer, nor do the forwards they consumed."""
        self._drop(
            request_id
            for request_id, call in list(self._entries.items())
            if request_id > self._anchor and call.op in _WINDOW and request_id not in self.tickets
        )

    def _drop(self, request_ids: Iterable[int]) -> None:
        """A call that is being repeated at the moment lets go of its tensors when that is done."""
        for request_id in request_ids:
            call = self._entries.pop(request_id, None)
            self._consumers.pop(request_id, None)
            if call is not None:
                self._size_bytes -= call.size_bytes
                if not call.is_replay:
                    call.on_unneeded(call)
