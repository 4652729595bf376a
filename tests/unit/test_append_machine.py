"""Sequences that grow while workers join, leave and die, and brokers restart: no append is lost, none applied twice."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from tests.unit.sequence_world import DONE, TICK_S, Asked, World

NAMES = st.sampled_from(["a", "b", "c", "d"])
SEQUENCES = ("s0", "s1", "s2", "s3")
SEQ_IDS = st.sampled_from(SEQUENCES)
ENOUGH_S = 12.0
"""For whoever leaves to have left, and for a copy of what was lost."""
SETTLED_S = 2.5
"""When all that have joined have told what they hold, and what is to move has been found."""


class AppendMachine(RuleBasedStateMachine):
    """One client, which asks again under the same id for as long as it hears nothing.

    done: by sequence, what was acknowledged, in order. open: what was not, with the request that asked for it first.
    """

    @initialize(rf=st.integers(1, 2))
    def begin(self, rf: int) -> None:
        self.world = World(("a", "b", "c"))
        self.rf = rf
        self.values = 0
        self.done: dict[str, list[int]] = {seq_id: [] for seq_id in SEQUENCES}
        self.open: dict[str, tuple[int, Asked]] = {}

    @rule(seq_id=SEQ_IDS)
    def append(self, seq_id: str) -> None:
        if seq_id in self.open:
            self.ask_again(seq_id)
        self.values += 1
        assert self.world.append(seq_id, self.values, rf=self.rf, seconds=ENOUGH_S) == DONE
        self.done[seq_id].append(self.values)

    @rule(seq_id=SEQ_IDS, count=st.integers(0, 3))
    def broker_dies_with_an_answer(self, seq_id: str, count: int) -> None:
        """It is asked, workers get so far with it, and the broker that is to be told restarts."""
        if seq_id in self.open:
            return
        self.values += 1
        self.open[seq_id] = self.values, self.world.ask("append", seq_id, self.values, rf=self.rf)
        self.world.freeze_broker()
        for name in list(self.world.workers):
            self.world.deliver(name, count)
        self.world.restart_broker()
        if self.open[seq_id][1].answer == DONE:  # before anything went wrong
            self.done[seq_id].append(self.open.pop(seq_id)[0])

    @rule(seq_id=SEQ_IDS)
    def ask_again(self, seq_id: str) -> None:
        if seq_id in self.open:
            value, first = self.open.pop(seq_id)
            assert self.world.append(seq_id, value, rf=self.rf, seconds=ENOUGH_S, first=first) == DONE
            self.done[seq_id].append(value)

    def calm(self) -> None:
        """Who leaves has left, and what is to move has moved."""
        self.world.busy = set()
        self.world.run(SETTLED_S)
        for _ in range(round(ENOUGH_S / TICK_S)):
            stats = self.world.stats()
            is_leaving = any(peer.is_draining for peer in self.world.workers.values())
            if not is_leaving and stats.waiting_copies == stats.sequences_to_move == 0:
                return
            self.world.run(TICK_S)
        raise AssertionError(self.world.stats())

    @rule(name=NAMES)
    def worker_joins(self, name: str) -> None:
        if name not in self.world.workers:
            self.world.join(name)

    @rule(name=NAMES)
    def worker_leaves(self, name: str) -> None:
        others = [peer for other, peer in self.world.workers.items() if other != name and not peer.is_draining]
        if name in self.world.workers and len(others) >= self.rf:
            self.world.drain(name)

    @precondition(lambda self: self.rf == 2)
    @rule(name=NAMES)
    def worker_dies(self, name: str) -> None:
        """When everything has its second copy."""
        self.calm()
        if len(self.world.workers) > self.rf and name in self.world.workers:
            self.world.kill(name)
            self.check_all()

    @rule(name=NAMES, count=st.integers(1, 3))
    def worker_reads_some(self, name: str, count: int) -> None:
        self.world.deliver(name, count)

    @rule(ticks=st.integers(1, 40), settles=st.booleans())
    def time_passes(self, ticks: int, *, settles: bool) -> None:
        self.world.run(min(ticks, 40 if settles else 4) * TICK_S, settles=settles)

    @rule(busy=st.sets(NAMES))
    def requests_wait(self, busy: set[str]) -> None:
        self.world.busy = busy

    @rule()
    def check_all(self) -> None:
        """What is read is what was acknowledged, once, and at most once what nobody heard of yet."""
        self.world.check()
        for seq_id, done in self.done.items():
            if done:
                self.world.tell("get", seq_id, seconds=ENOUGH_S)
                values = self.world.read(seq_id)
                assert values in {tuple(done), (*done, self.open.get(seq_id, (0,))[0])}, (seq_id, values, done)

    def teardown(self) -> None:
        """In the end each sequence is where the ring wants it."""
        if not hasattr(self, "world"):
            return
        for seq_id in list(self.open):
            self.ask_again(seq_id)
        self.calm()
        self.check_all()
        for seq_id, done in self.done.items():
            if done:
                assert self.world.owner(seq_id) in self.world.copies(seq_id)
                assert len(self.world.copies(seq_id)) == self.rf


AppendMachine.TestCase.settings = settings(max_examples=8, stateful_step_count=12, deadline=None)
TestAppendMachine = AppendMachine.TestCase
