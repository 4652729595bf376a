"""Named sequences under every order of writes, reads, freezes, kills, drains and restarts: no read is ever stale."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from bus.errors import ErrorCode
from tests.unit.sequence_world import DONE, World, stale

NAMES = ("a", "b", "c")
SEQUENCES = ("s0", "s1", "s2")
KINDS = st.sampled_from(["put", "put", "get", "get", "delete", "pin", "unpin"])


class SequenceMachine(RuleBasedStateMachine):
    """Requests overlap, and workers read their messages when they are told to."""

    @initialize(num_pages=st.sampled_from([4, 64]), kills=st.booleans())
    def begin(self, num_pages: int, *, kills: bool) -> None:
        """Either workers are killed or the broker is: who loses both loses what they knew."""
        self.world = World(NAMES, num_pages)
        self.has_room = num_pages > 4
        self.kills = kills
        self.calm_until = 0.0
        self.values = 0

    @rule(kind=KINDS, seq_id=st.sampled_from(SEQUENCES), rf=st.integers(1, 2))
    def ask(self, kind: str, seq_id: str, rf: int) -> None:
        self.values += 1
        self.world.ask(kind, seq_id, self.values, rf=rf)

    @rule(kind=KINDS, seq_id=st.sampled_from(SEQUENCES), rf=st.integers(1, 2))
    def ask_and_wait(self, kind: str, seq_id: str, rf: int) -> None:
        self.values += 1
        self.world.tell(kind, seq_id, self.values, rf=rf, seconds=0.5)

    @precondition(lambda self: self.kills and not any(peer.frozen for peer in self.world.workers.values()))
    @rule(name=st.sampled_from(NAMES), gap=st.sampled_from([0.0, 0.05, 1.0]))
    def what_two_workers_have_survives_one(self, name: str, gap: float) -> None:
        self.all_join()
        self.world.run(4.0)
        self.values += 1
        seq_id = f"durable{self.values}"
        assert self.world.tell("put", seq_id, self.values, rf=2) == DONE
        self.world.run(gap)
        self.world.kill(name)
        assert self.world.tell("get", seq_id) == self.values

    @precondition(lambda self: self.has_room and not any(peer.frozen for peer in self.world.workers.values()))
    @rule(name=st.sampled_from(NAMES), rf=st.integers(1, 2))
    def what_a_worker_has_is_there_when_it_has_left(self, name: str, rf: int) -> None:
        self.all_join()
        self.world.run(0.1)  # those that were killed just now have joined too
        self.values += 1
        assert self.world.tell("put", f"kept{self.values}", self.values, rf=rf) == DONE
        self.world.drain(name)
        assert self.world.tell("get", f"kept{self.values}") == self.values
        self.leave()
        assert self.world.tell("get", f"kept{self.values}") == self.values

    def leave(self) -> None:
        """Those that drain do so, in time or when their time is up."""
        for _ in range(240):
            if not any(peer.is_draining for peer in self.world.workers.values()):
                return
            self.world.run(0.05)
        raise AssertionError("a worker that drains does not leave")

    @rule(name=st.sampled_from(NAMES))
    def worker_drains(self, name: str) -> None:
        if name in self.world.workers:
            self.world.drain(name)

    @precondition(lambda self: not any(peer.frozen for peer in self.world.workers.values()))
    @rule()
    def all_join(self) -> None:
        """Those that leave have left, and are started anew."""
        self.leave()
        for name in NAMES:
            if name not in self.world.workers:
                self.world.join(name)

    @rule(name=st.sampled_from(NAMES), count=st.integers(1, 3))
    def deliver(self, name: str, count: int) -> None:
        self.world.deliver(name, count)

    @rule(seconds=st.sampled_from([0.05, 0.05, 0.3, 1.5]))
    def time_passes(self, seconds: float) -> None:
        self.world.run(seconds)

    @rule(name=st.sampled_from(NAMES), thaw=st.booleans())
    def worker_freezes_or_thaws(self, name: str, *, thaw: bool) -> None:
        if name not in self.world.workers:
            return
        if thaw:
            self.world.thaw(name)
        elif self.world.now >= self.calm_until:
            self.world.freeze(name)

    @rule(name=st.sampled_from(NAMES), seq_id=st.sampled_from(SEQUENCES))
    def worker_misses_a_change(self, name: str, seq_id: str) -> None:
        """Frozen for longer than its lease; it comes back whenever it comes back."""
        self.worker_freezes_or_thaws(name, thaw=False)
        self.world.run(1.5)
        self.ask_and_wait("put", seq_id, 1)

    @rule(name=st.sampled_from(NAMES), seq_id=st.sampled_from(SEQUENCES))
    def worker_comes_back_under_reads(self, name: str, seq_id: str) -> None:
        self.worker_freezes_or_thaws(name, thaw=True)
        self.world.watch(seq_id, 1.2)

    @precondition(lambda self: self.kills)
    @rule(name=st.sampled_from(NAMES))
    def worker_is_killed(self, name: str) -> None:
        if name in self.world.workers:
            self.world.kill(name)

    @precondition(lambda self: not self.kills)
    @rule()
    def broker_restarts(self) -> None:
        """While all can tell it what they know: of a worker that it never meets it knows nothing."""
        for name in NAMES:
            self.worker_freezes_or_thaws(name, thaw=True)
        self.world.restart_broker()
        self.calm_until = self.world.now + 2.0

    @precondition(lambda self: hasattr(self, "world"))
    @invariant()
    def nobody_was_told_what_was_no_longer_true(self) -> None:
        self.world.check()
        for read in self.world.history:
            if read.kind == "get" and read.answer is not None and not isinstance(read.answer, ErrorCode):
                because = stale(self.world.history, read)
                assert because is None, (read, because)

    def teardown(self) -> None:
        """When all is well again, what is written is read."""
        if not hasattr(self, "world"):
            return
        for name in NAMES:
            self.worker_freezes_or_thaws(name, thaw=True)
        self.all_join()
        self.world.run(4.0)
        assert all(len(self.world.stored(seq_id)) <= 1 for seq_id in SEQUENCES), "copies that differ"
        for number, seq_id in enumerate(SEQUENCES[:2]):
            assert self.world.tell("put", seq_id, 10_000 + number) == DONE
            assert self.world.tell("get", seq_id) == 10_000 + number
            assert self.world.tell("delete", seq_id) == DONE
            assert self.world.tell("get", seq_id) is ErrorCode.NOT_FOUND


SequenceMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=40, deadline=None)
TestSequenceMachine = SequenceMachine.TestCase
