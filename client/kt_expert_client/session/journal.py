"""What the server's state holds of this trainer's requests, and, where replay is on, the requests themselves.

A server that is killed begins anew from its last checkpoint. The journal says whether that loses anything of this trainer, and
has what is needed to repeat it: every request since then that changed the state.
"""

from __future__ import annotations

from collections.abc import Iterable

from kt_expert_proto.header import Op
from kt_expert_proto.lora import DEFAULT_ADAPTER, PARAMETER, PART_NUMBERS

from kt_expert_client.session.calls import Call
from kt_expert_client.session.contributions import ALL_LAYERS, Contributions, Place


class Journal:
    """Of settled requests, in the order of their ids. `limit_bytes` 0: nothing is kept, and a loss is a loss."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._entries: dict[int, Call] = {}
        self._users: dict[int, set[int]] = {}  # forward -> the backwards that used its ticket and may be repeated
        self._size_bytes = 0
        self._gone_through = 0  # requests up to here are not kept any more, and not durable either
        self._durable = 0  # the server has said that requests up to here survive its death
        self._anchor = 0  # the last request that changed an adapter, its moments or the step
        self._gradients = Contributions()  # what backwards have added up and no step has taken yet
        self.tickets: set[int] = set()  # forwards whose tickets are wanted
        self._used: dict[int, frozenset[Place]] = {}  # by those forwards: a ticket is of no use once one has changed
        self._changed: dict[Place, int] = {}  # the last request that changed an adapter in a layer, or in all of them
        self._all_changed = 0  # the last request that changed every adapter

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
            self._used[call.request_id] = frozenset((each.adapter, call.layer) for each in call.opened.forward.adapters)
        is_kept = call.changes_state and self.is_on
        if call.op is Op.BACKWARD:
            is_kept = self._backward(call) and is_kept
        elif call.op is Op.ZERO_GRAD:
            self._drop_unused(self._gradients.zeroed(call.opened.zero_grad.adapter))
            is_kept = False
        elif call.op is Op.EDIT_GRADIENTS:
            self._drop_unused(self._gradients.edited(call))
        elif call.changes_state and call.op is not Op.FORWARD:
            self._change(call)
        if not is_kept:
            call.on_unneeded(call)
            return
        self._entries[call.request_id] = call
        self._size_bytes += call.size_bytes
        if self._size_bytes > self._limit_bytes:
            self._gone_through = call.request_id
            self._drop(list(self._entries))

    def _backward(self, call: Call) -> bool:
        """Whether gradients are made of it now."""
        unused = self._gradients.added(call)
        is_used = call.request_id not in unused
        if is_used and call.ticket in self._entries:
            self._users.setdefault(call.ticket, set()).add(call.request_id)
        if not call.opened.backward.keep_ticket:
            self.released(call.ticket)
        self._drop_unused(unused)
        return is_used

    def _change(self, call: Call) -> None:
        self._anchor = call.request_id
        match call.op:
            case Op.STEP:
                sets = [each for group in call.opened.step.groups for each in group.sets]
                changed = {(each.adapter, layer) for each in sets for layer in each.layers or (ALL_LAYERS,)}
                self._gradients.stepped(call.opened.step.kept)
            case Op.WRITE_TENSOR:
                name = call.opened.write_tensor
                is_parameter = name.part == PART_NUMBERS[PARAMETER]
                changed = {(name.adapter or DEFAULT_ADAPTER, call.layer)} if is_parameter else set()
                self._gradients.written(call)
            case Op.DELETE_ADAPTER:
                changed = {(call.opened.delete_adapter.adapter, ALL_LAYERS)}
                self._drop_unused(self._gradients.zeroed(call.opened.delete_adapter.adapter))
            case Op.CREATE_ADAPTER:
                made = call.head is not None and call.head.created
                changed = {(call.opened.create_adapter.adapter, ALL_LAYERS)} if made else set()
            case Op.LOAD_CHECKPOINT:
                changed, self._all_changed = set(), call.request_id
                self._gradients.stepped(())
            case _:
                changed = set()  # the step count: no adapter has other values
        self._changed.update(dict.fromkeys(changed, call.request_id))

    def released(self, ticket: int) -> None:
        """No further backward will use the ticket: unless one that may have to be repeated did, nor will its forward be."""
        if ticket in self.tickets:
            self._forget_ticket(ticket)
            if ticket not in self._users:
                self._drop([ticket])

    def durable(self, through: int) -> None:
        """Requests up to there survive the server's death. A ticket does not: its forward is kept while a backward that does
        not survive needs it."""
        self._durable = max(self._durable, through)
        if self._gone_through <= through:
            self._gone_through = 0
        needed = self.tickets | {forward for forward, users in self._users.items() if max(users) > through}
        self._drop(each for each in list(self._entries) if each <= through and each not in needed)

    def lost(self, included: int) -> bool:
        """Whether a server that has only this trainer's requests up to `included`, and none of its tickets and gradients,
        lacks something."""
        return self._anchor > included or not self._gradients.is_empty or any(map(self._is_valid, self.tickets))

    def _is_valid(self, ticket: int) -> bool:
        """No adapter of its forward has changed since."""
        places = {place for adapter, layer in self._used[ticket] for place in ((adapter, layer), (adapter, ALL_LAYERS))}
        return ticket > max((self._changed.get(place, 0) for place in places), default=0) and ticket > self._all_changed

    def can_repeat(self, included: int) -> bool:
        # What was durable is not kept. A server that has lost it all the same cannot be brought back.
        return self.is_on and max(self._gone_through, self._durable) <= included

    def to_repeat(self, included: int) -> list[Call]:
        """What brings such a server to where this trainer is, in order."""
        return [
            call
            for request_id, call in sorted(self._entries.items())
            if request_id > included or self._is_needed(request_id, included)
        ]

    def _is_needed(self, forward: int, included: int) -> bool:
        """Its ticket is, by somebody who holds it or by a backward that is to be repeated."""
        if max(self._users.get(forward, ()), default=0) > included:
            return True
        return forward in self.tickets and self._is_valid(forward)

    def clear(self) -> None:
        self._drop(list(self._entries))
        self.tickets.clear()
        self._used.clear()

    def _forget_ticket(self, ticket: int) -> None:
        self.tickets.discard(ticket)
        self._used.pop(ticket, None)

    def _drop_unused(self, requests: Iterable[int]) -> None:
        """These add to no gradient any more: neither they nor forwards that only they used need be repeated."""
        for request_id in requests:
            self._drop([request_id])
            for forward, users in list(self._users.items()):
                users.discard(request_id)
                if not users:
                    del self._users[forward]
                    if forward not in self.tickets:
                        self._drop([forward])

    def _drop(self, request_ids: Iterable[int]) -> None:
        """A call that is being repeated at the moment lets go of its tensors when that is done."""
        for request_id in request_ids:
            call = self._entries.pop(request_id, None)
            self._users.pop(request_id, None)
            if call is not None:
                self._size_bytes -= call.size_bytes
                if not call.is_replay:
                    call.on_unneeded(call)
