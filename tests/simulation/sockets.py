"""Bytes that come as they like, as over a bare socket: what one send carried arrives in bites of any size."""

from __future__ import annotations

import random
from typing import Any

from kt_expert_proto.codec import Decoder
from kt_expert_proto.messages import Messages

_LARGEST_BITE = 150  # of a message of some hundred bytes


class Bites:
    """Feeds a decoder through the product's way from bytes to messages."""

    def __init__(self, decoder: Decoder[Any], rng: random.Random) -> None:
        self._decoder, self._rng = decoder, rng
        self._messages = Messages(decoder)

    def feed(self, sent: bytes) -> None:
        """Raises FrameError."""
        while sent:
            room = self._messages.room()
            size = min(len(sent), len(room), self._rng.randint(1, _LARGEST_BITE))
            room[:size] = sent[:size]
            sent = sent[size:]
            for message in self._messages.received(size):
                self._decoder.feed(message)
