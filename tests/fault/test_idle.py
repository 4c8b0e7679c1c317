"""A trainer that idles for minutes, in real time, beside everything else the tests do."""

from __future__ import annotations

import re

from support.idle import IdleTrainer


def test_an_idle_trainer_stays_connected(idle_trainer: IdleTrainer) -> None:
    """200 s: longer than two keepalive intervals and their time-outs together, which is when too many pings were noticed."""
    assert idle_trainer.wait() == "3 0.0\n"
    log = idle_trainer.server_log()
    assert not re.search(r"lost its lease|Too many pings|fault", log), log
