"""Trainers that are away for minutes, in real time, beside everything else the tests do."""

from __future__ import annotations

import re

import kt_expert_client as kt
from kt_expert_client import AdamW
from support.absent import AbsentTrainers
from support.batches import LORA, train_step
from support.server import ServerProcess

from fault.absent_trainer import STEPS, digest


def test_absence_changes_nothing(server: ServerProcess, absent_trainers: AbsentTrainers) -> None:
    """Four minutes of idling before, between, within and after steps, longer than keepalive intervals and leases; and
    processes that are stopped, or whose own code keeps all Python threads waiting, for longer than their lease and for longer
    than a connection lives without a word."""
    with kt.connect(server.address) as client:
        run = client.open_run(lora=LORA, wire_dtype="fp32", seed=3)
        for step in range(STEPS):
            train_step(run, step)
            train_step(run, 10 + step)
            run.step(AdamW(1e-2))
        expected = digest(run)
    assert absent_trainers.wait() == dict.fromkeys(absent_trainers.names, f"{expected}\n")
    log = absent_trainers.server_log()
    assert not re.search(r"Too many pings|fault", log), log
    assert not re.search(r"(before|between|within|after|busy).* lost its lease", log), log  # gRPC answers for them
