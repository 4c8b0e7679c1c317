"""The calls of one session that have no outcome yet."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

from kt_expert_proto.header import FrameError, Header
from kt_expert_proto.v1.session_pb2 import Joined

from kt_expert_client.session.calls import Call

ANSWER_SLACK_S = 5.0  # the server enforces a call's deadline; this is for its answer to travel


class InFlight:
    """In the order of their ids. `unsent` are those that are to be sent on the present connection, or on the next."""

    def __init__(self) -> None:
        self.calls: dict[int, Call] = {}
        self.unsent: deque[Call] = deque()

    def __iter__(self) -> Iterator[Call]:
        return iter(list(self.calls.values()))

    def has_room(self, size_bytes: int, joined: Joined) -> bool:
        """Whether the credits are enough for one more call. Those of repeated ones are the session's own affair."""
        waiting = [call for call in self.calls.values() if not call.is_replay]
        used = sum(call.size_bytes for call in waiting)
        return len(waiting) < joined.credit_requests and used + size_bytes <= joined.credit_bytes

    @property
    def has_sent(self) -> bool:
        """Some outcome is on its way, as far as this side knows."""
        return any(call.is_sent for call in self.calls.values())

    def add(self, call: Call) -> None:
        self.calls[call.request_id] = call
        self.unsent.append(call)

    def take_sendable(self, joined: Joined) -> Call | None:
        """The next call to send, where there is one and the server's credits allow it."""
        if not self.unsent:
            return None
        call = self.unsent[0]
        sent = [each for each in self.calls.values() if each.is_sent]
        size = sum(each.size_bytes for each in sent) + call.size_bytes
        if len(sent) >= joined.credit_requests or size > joined.credit_bytes:
            return None
        call.is_sent = True
        return self.unsent.popleft()

    def outcome_of(self, header: Header) -> Call:
        """The call whose outcome comes next: they come in the order of ids. Raises FrameError for any other."""
        first = next(iter(self.calls.values()), None)
        if first is None or first.request_id != header.request_id or not first.is_sent:
            raise FrameError(
                f"an outcome of request {header.request_id} came, expected that of "
                f"{'none' if first is None else first.request_id}"
            )
        return first

    def remove(self, call: Call) -> None:
        del self.calls[call.request_id]
        call.is_sent = False

    def take_unsent(self) -> list[Call]:
        """Removes the calls that have not been sent."""
        calls, self.unsent = list(self.unsent), deque()
        for call in calls:
            del self.calls[call.request_id]
        return calls

    def take_replays(self) -> list[Call]:
        """Removes the calls that were to be repeated."""
        calls = [call for call in self.calls.values() if call.is_replay]
        for call in calls:
            self.remove(call)
            call.is_replay = False
        return calls

    def take_all(self) -> list[Call]:
        calls = list(self.calls.values())
        self.calls.clear()
        self.unsent.clear()
        return calls

    def cut(self) -> None:
        """The connection is gone, and with it what was half received."""
        for call in self.calls.values():
            call.is_sent = False
            call.drop_results()

    def resume(self, received: int) -> None:
        """The server has the requests up to there."""
        for call in self.calls.values():
            call.is_sent = call.request_id <= received
        self.unsent = deque(call for call in self.calls.values() if not call.is_sent)

    def begin_afresh(self, replays: Iterable[Call]) -> None:
        """The server has none of the requests; these were settled before and come first."""
        again = {call.request_id: call for call in replays}
        for call in again.values():
            call.is_replay = True
        self.calls = dict(sorted((again | self.calls).items()))
        self.resume(0)

    def tickets(self) -> set[int]:
        """Those that the calls consume."""
        return {call.ticket for call in self.calls.values() if call.ticket}

    def overdue(self, now: float) -> list[Call]:
        """Calls whose callers have waited long enough."""
        return [call for call in self.calls.values() if _is_waited_for(call) and now >= call.deadline + ANSWER_SLACK_S]

    def next_deadline(self) -> float | None:
        return min((call.deadline + ANSWER_SLACK_S for call in self.calls.values() if _is_waited_for(call)), default=None)


def _is_waited_for(call: Call) -> bool:
    return not call.is_replay and not call.is_given_up
