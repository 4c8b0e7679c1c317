"""One schedule: a training under faults that a seed has chosen, and what must have become of it."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache

from kt_expert_proto.header import MAX_PAYLOAD_BYTES
from kt_expert_server.adapters.adapter import Adapter
from kt_expert_server.adapters.transfer import all_tensors
from kt_expert_server.members.limits import Limits

from simulation.disk import SimulatedDisk
from simulation.heap import Action, EventHeap
from simulation.network import Connection, Faults
from simulation.server import ServerProcess
from simulation.shared import Shared
from simulation.trainer import TrainerProcess
from simulation.training import Plan

_MAX_EVENTS = 400_000
_WITH_ADAPTERS = 4  # every fourth schedule has trainings with several adapters
_WITH_WEIGHTS = 5  # and every fifth of the others trainings in full
_MAX_SECONDS = 50_000.0  # of virtual time; a schedule that takes longer hangs
LENGTHS = (5, 6, 8, 12, 20)  # steps of a training
_OFTEN = (84, 8, 4, 3, 1)  # how often each: long ones find no more for their time
MICRO_BATCHES = (1, 2)
_RETAINED_S = 930.0  # a pause of this length costs a member what it had
_AFTERMATH_S = 120.0  # until what went wrong last has been noticed everywhere
_LIMITS = Limits(lease_s=30.0, retention_s=900.0)
_ISOLATED = Faults(lose=1.0, refuse=1.0)
_PROFILES = (
    Faults(),
    Faults(cut=0.01),
    Faults(cut=0.04),
    Faults(lose=0.01),
    Faults(damage=0.02),
    Faults(repeat=0.02),
    Faults(truncate=0.02),
    Faults(stall=0.01),
    Faults(latency_s=0.05, cut=0.01),
    Faults(cut=0.01, lose=0.005, repeat=0.005, damage=0.005, truncate=0.005, stall=0.01, refuse=0.3),
)


class SimulationError(AssertionError):
    """A schedule did not end as it must. The text says how to play it again."""


@dataclass
class Result:
    """What a schedule was, for the account at the end."""

    seed: int
    virtual_s: float
    events: int
    server_kills: int
    server_stops: int
    trainer_kills: int
    connections: int
    losses: int
    shared_batches: int


def digest(adapters: Mapping[str, Adapter], step: int) -> str:
    """Of parameters, moments and step, to the bit."""
    total = hashlib.sha256(str(step).encode())
    for tensor, live in all_tensors(adapters, parameters=True, moments=True):
        total.update(f"{tensor}".encode())
        total.update(live.read().tobytes())
    return total.hexdigest()


def undisturbed(plan: Plan) -> tuple[str, dict[int, str]]:
    """The digest of the plan's training if nothing happens to it, and what it reads on its way."""
    return _undisturbed(replace(plan, rank=0, replay=False, cancels=0.0, extras=0.0, piece_bytes=MAX_PAYLOAD_BYTES))


def count_undisturbed() -> int:
    """How many of them are known."""
    return _undisturbed.cache_info().currsize


@cache
def _undisturbed(plan: Plan) -> tuple[str, dict[int, str]]:
    plans = [replace(plan, rank=rank) for rank in range(plan.world_size)]
    world = World(random.Random(0), plans, _LIMITS)
    world.run_to_end()
    return world.digests[plan.run], world.trainers[0].reads


_ON_ONE_HOST = 0.5  # of the connections
_OVER_A_SOCKET = 0.5  # of the others


class World:
    """One server, its disk, its trainers and what is between them."""

    def __init__(self, rng: random.Random, plans: list[Plan], limits: Limits) -> None:
        self.rng = rng
        self.heap = EventHeap()
        self.faults = Faults()
        self.calm_at = 0.0
        self.digests: dict[int, str] = {}  # of runs whose trainers may leave
        self.connections = 0
        self.disk = SimulatedDisk(random.Random(rng.getrandbits(64)))
        own = random.Random(rng.getrandbits(64))
        self.server = ServerProcess(self.heap, own, self.disk, limits, plans[0].piece_bytes)
        self.server.start()
        self.trainers: list[TrainerProcess] = []
        for plan in plans:
            own = random.Random(rng.getrandbits(64))
            self.trainers.append(TrainerProcess(self.heap, own, plan, self.connect, self.may_leave))

    def connect(self, trainer: TrainerProcess) -> Connection | None:
        del trainer
        self.connections += 1
        if self.rng.random() < self.faults.refuse or not self.server.is_up:
            return None
        nobody = _Nobody()
        shared = Shared() if self.rng.random() < _ON_ONE_HOST else None
        is_socket = self.rng.random() < _OVER_A_SOCKET
        connection = Connection(self.heap, self.rng, lambda: self.faults, (nobody, nobody), shared, is_socket=is_socket)
        stream = self.server.accept(connection)
        if stream is None:
            return None
        connection._ends = (nobody, stream)
        return connection

    def may_leave(self, plan: Plan) -> bool:
        """Once all ranks have taken all steps, and the server has the result. A rank that left cannot help others to repeat
        what a dying server loses, so those of larger runs stay until nothing goes wrong any more."""
        trained = all(each.has_trained or each.is_done for each in self.trainers if each.plan.run == plan.run)
        run = None if self.server.core is None else self.server.core.runs.by_name.get(plan.name)
        if not trained or run is None or run.step != plan.steps or (plan.world_size > 1 and self.heap.now < self.calm_at):
            return False
        self.digests[plan.run] = digest(run.adapters, run.step)
        return True

    def run_to_end(self) -> None:
        while not all(trainer.is_done for trainer in self.trainers):
            if not self.heap.step():
                raise AssertionError("nothing is left to happen and training is not done")
            if self.heap.count > _MAX_EVENTS or self.heap.now > _MAX_SECONDS:
                raise AssertionError(f"training is not done after {self.heap.now:.0f} s and {self.heap.count} events")
        failures = [trainer.failure for trainer in self.trainers if trainer.failure]
        assert not failures, failures
        self._settle()

    def _settle(self) -> None:
        """Lets what is under way end: the last leave, the last write."""
        self.faults = Faults()
        until = self.heap.now + 100.0
        while self.heap.next_time <= until:
            self.heap.step()
        if not self.server.is_up:
            self.server.start()


class _Nobody:
    def on_message(self, message: bytes) -> None:
        raise AssertionError("a message came before its receiver")

    def on_end(self, reason: str) -> None:
        pass


def choose_plans(rng: random.Random) -> list[Plan]:
    plans: list[Plan] = []
    piece_bytes = rng.choice((MAX_PAYLOAD_BYTES, MAX_PAYLOAD_BYTES, MAX_PAYLOAD_BYTES, 160))  # a small one cuts tensors
    for run in range(rng.choice((1, 1, 1, 1, 2))):
        world_size = rng.choice((1, 1, 1, 2, 3)) if not plans else rng.choice((1, 2))
        replay = rng.random() < 0.6
        first = Plan(
            run, 0, world_size, rng.choices(LENGTHS, _OFTEN)[0], rng.choices(MICRO_BATCHES, (2, 1))[0], replay,
            drops=rng.random() < 0.3, edits=world_size == 1 and rng.random() < 0.3,
            cancels=rng.choice((0.0, 0.0, 0.05)), extras=rng.choice((0.0, 0.1)), piece_bytes=piece_bytes,
        )  # fmt: skip
        plans += [replace(first, rank=rank) for rank in range(world_size)]
    return plans


def choose_limits(rng: random.Random) -> Limits:
    return replace(_LIMITS, checkpoint_every_steps=rng.choice((0, 1, 1, 2, 3)), keep_checkpoints=rng.choice((1, 2)))


def plan_faults(world: World, rng: random.Random) -> None:
    """Puts what is to go wrong on the heap. After a while nothing does any more, so that every training can end."""
    world.faults = rng.choice(_PROFILES)
    quiet_at = rng.choice((2.0, 20.0, 400.0))
    world.calm_at = quiet_at + _AFTERMATH_S
    heap = world.heap
    heap.at(quiet_at, lambda: _calm(world))

    def within(end: float) -> float:
        # A training that nothing holds up is over in half a second; one that waits for a lease takes a minute.
        return rng.random() ** 2 * min(rng.choice((0.3, 3.0, end)), quiet_at)

    _plan_server_faults(world, rng, within)
    for trainer in world.trainers:
        for _ in range(rng.choice((0, 0, 0, 1, 2))):
            away = rng.choice((0.1, 40.0, 110.0))
            heap.at(within(60.0), lambda trainer=trainer, away=away: _kill_trainer(heap, trainer, away))
        if rng.random() < 0.25:
            length = rng.choice((1.0, 40.0, 110.0, 1000.0))
            heap.at(within(30.0), lambda trainer=trainer, length=length: _pause(world, trainer, length))


def _plan_server_faults(world: World, rng: random.Random, within: Callable[[float], float]) -> None:
    heap, server = world.heap, world.server
    for _ in range(rng.choice((0, 0, 1, 2, 4))):
        down, at = rng.choice((0.01, 1.0, 45.0)), within(60.0)
        if rng.random() < 0.5:  # its network goes first
            heap.at(at, lambda: _isolate(world))
            at += 0.5
        heap.at(at, lambda down=down: _kill_server(server, down))
    for _ in range(rng.choice((0, 0, 0, 1, 2))):
        down = rng.choice((0.01, 5.0))
        heap.at(within(60.0), lambda down=down: server.later(server.stop, down))
    for _ in range(rng.choice((0, 0, 0, 1, 2))):
        heap.at(within(60.0), _setter(server.disk, "dies_after", rng.randrange(30)))
    if rng.random() < 0.15:
        heap.at(within(10.0), lambda: setattr(server.disk, "is_full", True))
    if rng.random() < 0.15:
        length = rng.choice((5.0, 100.0))
        heap.at(within(30.0), lambda length=length: setattr(server, "paused_until", heap.now + length))


def _setter(target: object, name: str, value: object) -> Action:
    return lambda: setattr(target, name, value)


def _calm(world: World) -> None:
    world.faults = Faults()
    world.disk.is_full = False
    world.disk.dies_after = None


def _isolate(world: World) -> None:
    """For half a second nothing comes through, and nobody is told."""
    before, world.faults = world.faults, _ISOLATED

    def reconnect() -> None:
        if world.faults is _ISOLATED:
            world.faults = before

    world.heap.after(0.5, reconnect)


def _kill_server(server: ServerProcess, down: float) -> None:
    if server.is_up:
        server.kill()
        server.restart_after(down)


def _kill_trainer(heap: EventHeap, trainer: TrainerProcess, away: float) -> None:
    if trainer.is_done:
        return
    trainer.kill()
    generation = trainer.generation
    heap.after(away, lambda: trainer.start() if trainer.generation == generation else None)


def _pause(world: World, trainer: TrainerProcess, length: float) -> None:
    if trainer.is_done:
        return
    trainer.paused_until = world.heap.now + length
    trainer.was_paused_long = trainer.was_paused_long or length > _RETAINED_S
    link = trainer._link
    if link is not None and length > 50.0:
        world.heap.after(50.0, lambda: link.connection.cut("keepalive"))


def play(seed: int) -> Result:
    """Raises SimulationError where anything is not as it must be."""
    rng = random.Random(seed)
    plans, limits = choose_plans(rng), choose_limits(rng)
    if seed % _WITH_ADAPTERS == 0:
        plans = [replace(plan, adapters=True, drops=False, edits=False) for plan in plans]
    elif seed % _WITH_WEIGHTS == 0:
        plans = [replace(plan, weights=True, drops=False, edits=False) for plan in plans]
    world = World(rng, plans, limits)
    plan_faults(world, rng)
    try:
        world.run_to_end()
        for plan in plans:
            _check_trainer_of(world, plan)
        _check_nothing_left(world)
    except AssertionError as error:
        raise SimulationError(f"seed {seed}: {error}\nplay it again: make simulate SEEDS=1 FIRST={seed}") from error
    return Result(
        seed, world.heap.now, world.heap.count, world.server.kills, world.server.stops,
        sum(each.restarts for each in world.trainers), world.connections, sum(each.losses for each in world.trainers),
        world.server.shared_batches,
    )  # fmt: skip


def _check_trainer_of(world: World, plan: Plan) -> None:
    """The run ended with the bits of one to which nothing happened, and who could repeat lost nothing."""
    expected, reads = undisturbed(plan)
    assert world.digests[plan.run] == expected, f"{plan.name}: the adapter differs from the undisturbed one"
    trainer = world.trainers[[each.plan for each in world.trainers].index(plan)]
    for step, digest_of_step in trainer.reads.items():
        assert reads[step] == digest_of_step, f"{plan.name}: what was read before step {step + 1} was another state"
    # Only a dead server, or a pause beyond what members are kept for, makes a trainer lose anything.
    unharmed = not world.server.kills and not world.server.stops and not trainer.restarts and not trainer.was_paused_long
    assert not (unharmed and trainer.losses), f"rank {plan.rank} of {plan.name} lost steps although nobody died"
    # A trainer that was started again cannot repeat what its predecessor did. And a step that was asked for before a forward
    # had its outcome may be durable while that outcome goes with the member, if its trainer stays away.
    left_behind = trainer.went_ahead and trainer.was_paused_long
    could_repeat = plan.replay and not trainer.restarts and not left_behind
    assert not (could_repeat and trainer.losses), f"rank {plan.rank} of {plan.name} lost steps it could have repeated"


def _check_nothing_left(world: World) -> None:
    core = world.server.core
    assert core is not None
    left = [str(member) for member in core.runs.members if member.stream is not None]
    assert not left, f"{left} are joined although all trainers have left"
    for member in core.runs.members:  # killed ones, whose lease is not over
        core.runs.remove(member)
    core.take_actions()
    assert world.server.pool.out == 0, f"{world.server.pool.out} buffers were not given back"
    for shared in world.server.shared:
        shared.check_given_back()
    for run in list(core.runs.by_name.values()):
        core.runs.close(run)
    core.take_actions()
    reserved = {
        kind: world.server.budget.reserved(kind) for kind in ("requests", "outcomes", "tickets", "scratch", "gradients")
    }
    assert not any(reserved.values()), f"memory is still reserved: {reserved}"
