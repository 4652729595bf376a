"""Named sequences when workers leave and die: what is to outlive them is copied first, and never a stale version."""

from __future__ import annotations

import itertools

import pytest

from bus import wire
from bus.errors import ErrorCode
from bus.messages import HandedOver
from kvcache.broker.directory import Name
from kvcache.broker.homing import BURST_S, SHARE, Allowance
from kvcache.broker.later import Later
from kvcache.ring import HashRing
from kvcache.routing.keys import sequence_key
from tests.unit.sequence_world import DONE, TICK_S, USER, Asked, World
from workers.engine_api import Forgotten, Retained
from workers.keys import SequenceKey


@pytest.fixture
def world() -> World:
    return World(("a", "b", "c"))


def put_all(world: World, count: int, *, rf: int = 1) -> dict[str, int]:
    values = {f"s{number}": number for number in range(count)}
    for seq_id, value in values.items():
        assert world.tell("put", seq_id, value, rf=rf) == DONE
    return values


def test_a_worker_that_drains_hands_its_sequences_over_and_leaves(world: World) -> None:
    values = put_all(world, 20)
    mine = [seq_id for seq_id in values if world.owner(seq_id) == "a"]
    assert mine
    world.drain("a")
    for seq_id, value in values.items():
        assert world.tell("get", seq_id) == value
    world.run(0.5)
    assert "a" not in world.workers, "it has nothing left to wait for"
    for seq_id, value in values.items():
        assert len(world.copies(seq_id)) == 1
        assert world.tell("get", seq_id) == value
    world.check()


def test_a_worker_without_sequences_leaves_at_once(world: World) -> None:
    world.drain("a")
    world.run(0.1)
    assert "a" not in world.workers


def test_two_that_drain_at_once_hand_over_to_the_third(world: World) -> None:
    values = put_all(world, 20)
    world.drain("a")
    world.drain("b")
    world.run(1.0)
    assert set(world.workers) == {"c"}
    assert all(world.tell("get", seq_id) == value for seq_id, value in values.items())


def test_one_that_drains_while_it_is_handed_sequences_hands_them_on(world: World) -> None:
    values = put_all(world, 20)
    world.drain("a")
    world.deliver("b", 2)
    world.deliver("c", 2)
    world.drain("b")
    world.run(1.0)
    assert set(world.workers) == {"c"}
    assert all(world.tell("get", seq_id) == value for seq_id, value in values.items())


def test_the_last_worker_leaves_although_nobody_can_take_what_it_has(caplog: pytest.LogCaptureFixture) -> None:
    world = World(("a",))
    assert world.tell("put", "s", 1) == DONE
    world.drain("a")
    world.run(0.2)
    assert world.workers == {}
    assert "1 named sequences are lost" in caplog.text


def owned(world: World, owner: str, count: int) -> list[str]:
    names = (f"{owner}{number}" for number in itertools.count())
    return list(itertools.islice((name for name in names if world.owner(name) == owner), count))


def test_where_one_has_no_room_another_takes_the_copy_and_nothing_is_evicted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    world = World(("a", "b", "c"), num_pages=8)  # of each; a sequence takes two
    names = [*owned(world, "a", 3), *owned(world, "b", 3), *owned(world, "c", 3)]
    for value, seq_id in enumerate(names):
        assert world.tell("put", seq_id, value) == DONE
    world.drain("a")
    world.run(1.0)
    assert "1 named sequences are lost" in caplog.text, "there is room for two more, wherever they belong"
    found = [world.tell("get", seq_id, seconds=0.0) for seq_id in names]
    assert found[3:] == list(range(3, 9))
    assert sorted(str(answer) for answer in found[:3]) == sorted(["1", "2", str(ErrorCode.NOT_FOUND)])


def test_what_is_read_while_its_holder_drains_is_handed_over_first(world: World) -> None:
    values = put_all(world, 40)
    mine = [seq_id for seq_id in values if world.owner(seq_id) == "a"]
    world.drain("a")
    assert world.ask("get", mine[0]).answer is ErrorCode.NO_WORKERS, "it was least recently used"
    for _ in range(3):
        for name in ("a", "b", "c"):
            world.deliver(name, 100)
    assert world.copies(mine[0]) - {"a"}
    assert len([seq_id for seq_id in mine if world.copies(seq_id) - {"a"}]) < len(mine)


def test_a_second_copy_is_made_anew_when_one_of_two_is_lost(world: World) -> None:
    values = put_all(world, 20, rf=2)
    world.kill("a")
    world.run(2.0)
    for seq_id, value in values.items():
        assert len(world.copies(seq_id)) == 2
        assert world.tell("get", seq_id) == value
    world.kill("b")
    world.run(2.0)
    assert all(len(world.copies(seq_id)) == 2 for seq_id in values)
    assert all(world.tell("get", seq_id) == value for seq_id, value in values.items())


def test_a_write_to_two_workers_waits_for_the_copy_that_is_being_made(world: World) -> None:
    assert world.tell("put", "s", 1, rf=2) == DONE
    world.kill(world.owner("s"))
    assert world.tell("put", "s", 2, rf=2) == DONE
    assert len(world.copies("s")) == 2
    world.kill(world.owner("s"))
    assert world.tell("get", "s") == 2


def test_a_broker_that_restarts_learns_that_a_copy_is_missing(world: World) -> None:
    assert world.tell("put", "s", 1, rf=2) == DONE
    (lost, _) = sorted(world.copies("s"))
    world.kill(lost)
    world.restart_broker()
    world.run(4.0)
    assert len(world.copies("s")) == 2
    assert world.tell("get", "s") == 1


def test_two_copies_of_which_one_drains_are_two_again_before_it_leaves(world: World) -> None:
    values = put_all(world, 10, rf=2)
    world.drain("a")
    world.run(1.0)
    assert "a" not in world.workers
    assert all(world.copies(seq_id) == {"b", "c"} for seq_id in values)


@pytest.mark.parametrize("dies", ["source", "target"])
def test_a_worker_that_dies_while_it_copies_costs_a_copy_and_another_is_made(world: World, dies: str) -> None:
    assert world.tell("put", "s", 1, rf=2) == DONE
    holders = world.copies("s")
    (other,) = set(world.workers) - holders
    leaves = sorted(holders)[0]
    world.drain(leaves)
    world.deliver(other, 1)  # it asks for the sequence
    world.kill(other if dies == "target" else sorted(holders)[1])
    world.run(2.5)
    assert leaves not in world.workers
    assert world.tell("get", "s") == 1
    assert len(world.copies("s")) == 2
    world.check()


def test_a_write_that_overtakes_a_copy_makes_it_stale_and_it_is_copied_again(world: World) -> None:
    assert world.tell("put", "s", 1, rf=2) == DONE
    lost, left = sorted(world.copies("s"))
    world.kill(lost)
    world.freeze(left)  # it does not give the copy that the broker orders at the next tick before it has the write
    world.run(0.05)
    world.ask("put", "s", 2)
    world.thaw(left)
    world.run(2.0)
    assert world.tell("get", "s") == 2
    assert len(world.copies("s")) == 2
    world.check()


def test_what_is_deleted_while_it_is_copied_does_not_come_back(world: World) -> None:
    assert world.tell("put", "s", 1, rf=2) == DONE
    world.kill(world.owner("s"))
    world.workers["b"].inbox, held_back = [], world.workers["b"].inbox
    assert world.tell("delete", "s") in {DONE, ErrorCode.NOT_FOUND}
    world.workers["b"].inbox += held_back
    world.run(2.0)
    assert world.tell("get", "s") is ErrorCode.NOT_FOUND
    assert world.copies("s") == set()


def test_a_write_of_which_one_worker_died_is_told_again_and_gets_another_copy(world: World) -> None:
    owner = world.owner("s")
    world.freeze(owner)
    pending = world.ask("put", "s", 1, rf=2)
    (other,) = [name for name in world.workers if name != owner and world.workers[name].bulk]
    world.deliver(other, 10)
    world.kill(owner)
    world.run(0.1)
    assert pending.answer is ErrorCode.WORKER_LOST
    assert world.tell("put", "s", 1, rf=2) == DONE
    assert len(world.copies("s")) == 2


def test_a_write_to_two_where_nobody_is_left_to_have_the_second_is_refused_and_not_kept_waiting() -> None:
    world = World(("a", "b"))
    assert world.tell("put", "s", 1, rf=2) == DONE
    gone = world.owner("s")
    world.kill(gone)
    del world.workers[gone]  # nor does it come back
    assert world.tell("put", "s", 2, rf=2, seconds=0.5) is ErrorCode.CONFLICT
    world.join("c")
    assert world.tell("put", "s", 2, rf=2) == DONE


# --- a worker that joins -------------------------------------------------------------------------


def test_a_worker_that_joins_gets_what_it_owns_and_who_had_it_lets_go(world: World) -> None:
    values = put_all(world, 40)
    world.join("d")
    assert world.copies_on("d") == 0, "not before the ring has settled"
    world.run(3.0)
    assert world.copies_on("d") > 4
    assert {world.owner(seq_id) for seq_id in values if "d" in world.copies(seq_id)} == {"d"}
    for seq_id, value in values.items():
        assert world.copies(seq_id) == {world.owner(seq_id)}
        assert world.tell("get", seq_id) == value
    assert world.stats().moved_sequences == world.copies_on("d")
    assert world.stats().sequences_to_move == 0
    world.check()


def test_what_was_used_last_moves_first(world: World) -> None:
    values = put_all(world, 40)
    to_move = [seq_id for seq_id in values if next(HashRing(dict.fromkeys("abcd", 100)).preference(key(seq_id))) == "d"]
    wanted = to_move[0]
    assert world.tell("get", wanted) == values[wanted]
    world.join("d")
    while not world.copies_on("d"):
        world.run(TICK_S, settles=False)
        for name in "abcd":
            world.deliver(name, 1)
    assert "d" in world.copies(wanted)


def test_nothing_moves_while_requests_wait_at_an_end_of_it(world: World) -> None:
    put_all(world, 40)
    world.busy = {"a", "b", "c"}
    world.join("d")
    world.run(4.0)
    assert world.copies_on("d") == 0
    assert world.stats().sequences_to_move > 4
    world.busy = {"a"}
    world.run(3.0)
    assert world.copies_on("d") > 0
    assert world.stats().sequences_to_move == sum("a" in world.copies(f"s{n}") for n in range(40) if owns_d(n))


def owns_d(number: int) -> bool:
    return next(HashRing(dict.fromkeys("abcd", 100)).preference(key(f"s{number}"))) == "d"


def key(seq_id: str) -> bytes:
    return sequence_key(USER, seq_id).key


def test_a_sequence_that_is_about_to_move_is_served_where_it_is_and_explained(world: World) -> None:
    put_all(world, 40)
    world.busy = {"a", "b", "c"}
    world.join("d")
    world.run(4.0)
    seq_id = next(f"s{number}" for number in range(40) if owns_d(number))
    assert world.why(seq_id).endswith("its owner d has it not yet")
    world.busy = set()
    world.run(1.0)
    assert world.why(seq_id) == f"consistent_hash: owner of sequence {seq_id!r}"


def test_a_write_that_overtakes_a_move_is_not_lost_and_the_sequence_moves_with_it(world: World) -> None:
    put_all(world, 40)
    seq_id = next(f"s{number}" for number in range(40) if owns_d(number))
    world.tell("get", seq_id)
    (holder,) = world.copies(seq_id)
    world.freeze(holder)
    world.join("d")
    world.run(0.5)
    world.thaw(holder)
    world.run(0.8)
    world.ask("append", seq_id, 77)
    world.run(3.0)
    assert world.read(seq_id) == (int(seq_id[1:]), 77)
    assert world.copies(seq_id) == {"d"}


@pytest.mark.parametrize("kind", ["pin", "unpin"])
def test_a_pin_that_overtakes_a_move_moves_with_the_sequence(world: World, kind: str) -> None:
    put_all(world, 40)
    seq_id = next(f"s{number}" for number in range(40) if owns_d(number))
    if kind == "unpin":
        assert world.tell("pin", seq_id) == DONE
    world.tell("get", seq_id)  # so that it is the first to move
    (holder,) = world.copies(seq_id)
    world.join("d")
    while not world.workers["d"].letters:  # until what was there of it is on its way
        world.run(TICK_S, settles=False)
        for name in "dabc":
            world.deliver(name, 100)
    asked = world.ask(kind, seq_id)
    world.deliver(holder, 1)
    assert asked.answer == DONE
    world.run(4.0)
    assert world.copies(seq_id) == {"d"}
    assert world.is_pinned(seq_id) == (kind == "pin")


@pytest.mark.parametrize("is_over", [True, False])
def test_what_is_written_while_it_moves_is_not_there_yet_and_moves_again(world: World, is_over: bool) -> None:
    put_all(world, 40)
    seq_id = next(f"s{number}" for number in range(40) if owns_d(number))
    world.tell("get", seq_id)
    (holder,) = world.copies(seq_id)
    world.join("d")
    while not world.workers["d"].letters:
        world.run(TICK_S, settles=False)
        for name in "dabc":
            world.deliver(name, 100)
    before = world.stats()
    world.ask("put", seq_id, 77)
    if is_over:
        world.deliver(holder, 1)
    world.deliver("d", 100)
    after = world.stats()
    assert after.copied_sequences == before.copied_sequences + 1
    assert after.moved_sequences == before.moved_sequences
    world.run(5.0)
    assert world.copies(seq_id) == {"d"}
    assert world.tell("get", seq_id) == 77
    assert world.stats().moved_sequences == world.copies_on("d")


def move_to_newcomer(world: World) -> str:
    """A sequence that "b", which joins, gets from "a", the only other; "a" wrote it last and has told nobody yet, nor
    read that it is to let go."""
    put_all(world, 20)
    ring = HashRing(dict.fromkeys("ab", 100))
    seq_id = next(f"s{number}" for number in range(20) if next(ring.preference(key(f"s{number}"))) == "b")
    world.tell("get", seq_id)  # so that it is the first to move
    world.join("b")
    assert world.copies(seq_id) == {"a"}
    while world.copies(seq_id) == {"a"}:
        world.run(TICK_S, settles=False)
        world.ask("put", seq_id, 77)
        for name in "abab":
            world.deliver(name, 100)
    return seq_id


def test_what_its_last_holder_told_before_it_let_go_does_not_send_reads_there() -> None:
    world = World(("a",))
    seq_id = move_to_newcomer(world)
    world.run(TICK_S, settles=False)
    reads = [world.ask("get", seq_id) for _ in range(4)]
    world.settle()
    assert [read.answer for read in reads] == [77] * 4
    assert world.copies(seq_id) == {"b"}


def test_a_holder_that_never_heard_that_it_may_let_go_counts_when_it_is_back() -> None:
    world = World(("a",))
    seq_id = move_to_newcomer(world)
    world.workers["a"].inbox.clear()
    world.freeze_broker()
    world.run(1.5)
    world.thaw_broker()
    world.run(1.0)
    world.kill("b")
    world.run(0.5)  # another joins in its place, and owns it
    assert world.tell("get", seq_id) == 77


def test_two_copies_move_so_that_the_two_that_the_ring_prefers_have_them(world: World) -> None:
    values = put_all(world, 20, rf=2)
    world.join("d")
    world.run(3.0)
    ring = HashRing(dict.fromkeys("abcd", 100))
    for seq_id, value in values.items():
        assert world.copies(seq_id) == set(list(ring.preference(key(seq_id)))[:2])
        assert world.tell("get", seq_id) == value


def test_a_newcomer_without_room_keeps_what_fits_and_nothing_is_lost() -> None:
    world = World(("a", "b", "c"), num_pages=64)
    values = put_all(world, 40)
    world.num_pages = 4
    world.join("d")
    world.run(5.0)
    assert world.copies_on("d") == 2
    assert world.stats().failed_copies["NO_SPACE"] <= 3, "it is asked again ever more seldom"
    assert all(world.tell("get", seq_id) == value for seq_id, value in values.items())


@pytest.mark.parametrize("dies", ["the newcomer", "the holder"])
def test_a_death_in_the_middle_of_a_move_costs_only_what_the_dead_had(world: World, dies: str) -> None:
    values = put_all(world, 40)
    seq_id = next(seq_id for seq_id in reversed(values) if owns_d(int(seq_id[1:])))
    (holder,) = world.copies(seq_id)
    world.join("d")
    while "d" not in world.workers or not world.workers["d"].inbox:
        world.run(TICK_S, settles=False)
    world.deliver("d", 1)  # it asks for the first
    world.kill("d" if dies == "the newcomer" else holder)
    world.run(4.0)
    lost = {seq_id for seq_id, value in values.items() if world.tell("get", seq_id) != value}
    if dies == "the newcomer":
        assert lost == set()
    else:
        assert all(ring_of_three(seq_id) == holder for seq_id in lost)
    world.check()


def ring_of_three(seq_id: str) -> str:
    return next(HashRing(dict.fromkeys("abc", 100)).preference(key(seq_id)))


def test_moves_take_no_more_than_their_part_of_the_time() -> None:
    allowance = Allowance()
    assert allowance.left("a", 0.0) == BURST_S
    allowance.spend("a", 3.0, 0.0)
    assert allowance.left("a", 0.0) == BURST_S - 3.0
    assert allowance.left("a", 4.0) == pytest.approx(BURST_S - 3.0 + 4.0 * SHARE)
    assert allowance.left("a", 1000.0) == BURST_S
    allowance.keep({"b"})
    assert allowance.left("a", 0.0) == BURST_S


# --- a worker that leaves while its broker does ----------------------------------------------------


def test_a_worker_that_drains_while_its_broker_restarts_still_hands_over(world: World) -> None:
    values = put_all(world, 40)
    world.freeze("b")
    world.drain("a")  # its handover has only begun
    world.restart_broker()
    world.thaw("b")
    world.run(4.0)
    assert "a" not in world.workers
    assert all(world.tell("get", seq_id) == value for seq_id, value in values.items())


def test_a_worker_that_drains_and_regains_its_session_still_hands_over(world: World) -> None:
    values = put_all(world, 40)
    world.freeze_broker()
    world.run(1.5)
    world.drain("a")
    world.thaw_broker()
    world.run(4.0)
    assert "a" not in world.workers, "it is told to go when nothing is left to be copied"
    assert all(world.tell("get", seq_id) == value for seq_id, value in values.items())


def test_what_a_worker_tells_while_it_drains_ends_its_handover_no_second_time() -> None:
    world = World(("a", "b"))
    assert world.tell("put", owned(world, "a", 1)[0], 1) == DONE
    world.drain("a")
    for name in "abab":
        world.deliver(name, 100)
    assert world.copies_on("b") == 1
    world.run(TICK_S, settles=False)
    before = num_handed_over(world)
    generated(world, "a", "s")
    world.workers["a"].core.on_engine(Forgotten(SequenceKey(USER, "s")), world.now)
    world.run(TICK_S, settles=False)
    assert (before, num_handed_over(world)) == (1, 1)


def num_handed_over(world: World) -> int:
    """How often "a" is to read that it may leave."""
    return sum(isinstance(wire.decode_header(frames[0]), HandedOver) for frames in world.workers["a"].inbox)


def generated(world: World, name: str, seq_id: str) -> None:
    """A generation on this worker leaves its KV under that name."""
    world.workers[name].core.on_engine(Retained(SequenceKey(USER, seq_id)), world.now)


def test_what_comes_to_a_worker_while_it_drains_is_to_be_copied_too() -> None:
    world = World(("a", "b"))
    assert world.tell("put", owned(world, "a", 1)[0], 1) == DONE
    world.freeze("b")
    world.drain("a")
    generated(world, "a", "s")
    world.run(TICK_S)
    assert world.stats().waiting_copies == 2


def test_what_a_generation_left_stays_where_it_is_and_that_is_no_failure() -> None:
    world = World(("a",))
    ring = HashRing(dict.fromkeys("ab", 100))
    for number in range(10):
        generated(world, "a", f"s{number}")
    world.run(TICK_S)
    world.join("b")
    world.run(5.0)
    assert any(next(ring.preference(key(f"s{number}"))) == "b" for number in range(10))
    assert (world.stats().sequences_to_move, world.stats().failed_copies) == (0, {})


def test_a_worker_does_not_wait_for_ever_for_a_broker_that_is_gone(world: World) -> None:
    put_all(world, 10)
    world.freeze_broker()
    world.drain("a")
    world.run(9.5)
    assert "a" in world.workers
    world.run(1.0)
    assert "a" not in world.workers


def test_what_nobody_could_take_is_tried_again_when_there_may_be_room(world: World) -> None:
    world.num_pages = 2
    for name in ("a", "b", "c"):
        world.kill(name)
    world.run(2.0)
    names = [owned(world, name, 1)[0] for name in ("a", "b", "c")]
    assert world.tell("put", names[0], 1, rf=2) == DONE
    (free,) = set(world.workers) - world.copies(names[0])
    (lost,) = world.copies(names[0]) - {"a"}
    assert world.tell("put", names["abc".index(free)], 2) == DONE  # so that there is no room for another copy
    world.freeze(lost)
    world.run(6.0)
    assert world.copies(names[0]) == {"a", lost}
    assert 2 <= world.stats().failed_copies["NO_SPACE"] <= 4, "after a second, two more, and four more"
    assert world.tell("delete", names["abc".index(free)]) == DONE
    world.run(5.0)
    assert world.copies(names[0]) == {"a", lost, free}


def test_the_time_between_rounds_doubles_up_to_a_minute() -> None:
    later, name, now = Later(), Name("t", "s"), 0.0
    waits = []
    for rounds in range(1, 10):
        later.add(name, rounds, now)
        before = now
        while not (due := later.take(now)):
            now += 0.5
        assert due == [(name, rounds)]
        waits.append(now - before)
    assert waits == [1, 2, 4, 8, 16, 32, 64, 64, 64]


# --- workers that cannot reach each other ----------------------------------------------------------


def test_what_cannot_be_copied_directly_is_copied_through_the_broker(world: World) -> None:
    values = put_all(world, 40)
    world.has_walls = True
    world.join("d")
    world.run(3.0)
    for _ in range(60):  # that nobody answers is found out of each worker, and what that cost is paid off
        if not world.stats().sequences_to_move:
            break
        world.run(1.0)
    assert world.copies_on("d") > 4
    assert world.stats().peer_messages_relayed > 0
    world.drain("a")
    world.run(8.0)
    assert "a" not in world.workers
    assert all(world.tell("get", seq_id) == value for seq_id, value in values.items())
    world.check()


def test_what_can_be_copied_directly_is(world: World) -> None:
    put_all(world, 40)
    world.join("d")
    world.run(3.0)
    assert world.copies_on("d") > 4
    assert world.stats().peer_messages_relayed == 0


# --- once and no more ------------------------------------------------------------------------------


def lose_answer(world: World, seq_id: str, value: int) -> Asked:
    """An append that takes effect, of which nobody hears because the broker dies."""
    asked = world.ask("append", seq_id, value)
    world.freeze_broker()
    world.settle()
    world.restart_broker()
    assert asked.answer is None
    return asked


def test_an_append_whose_answer_was_lost_is_not_applied_again_where_the_sequence_went(world: World) -> None:
    assert world.tell("put", "s", 1) == DONE
    (holder,) = world.copies("s")
    asked = lose_answer(world, "s", 2)
    world.run(3.0)
    world.drain(holder)
    world.run(1.0)
    assert holder not in world.workers
    again = world.ask("append", "s", 2, again=asked)
    world.settle()
    assert again.answer == DONE
    assert world.read("s") == (1, 2)


def test_an_append_whose_answer_was_lost_is_not_applied_again_by_a_newcomer(world: World) -> None:
    seq_id = next(f"s{number}" for number in range(40) if owns_d(number))
    assert world.tell("put", seq_id, 1) == DONE
    asked = lose_answer(world, seq_id, 2)
    world.join("d")
    world.run(6.0)
    assert world.copies(seq_id) == {"d"}
    again = world.ask("append", seq_id, 2, again=asked)
    world.settle()
    assert (again.answer, world.read(seq_id)) == (DONE, (1, 2))
    assert world.append(seq_id, 3) == DONE
    assert world.read(seq_id) == (1, 2, 3)


def test_an_append_to_two_of_which_one_died_is_applied_once_on_the_copy_that_is_made_anew(world: World) -> None:
    assert world.tell("put", "s", 1, rf=2) == DONE
    first, second = sorted(world.copies("s"))
    world.freeze(second)
    asked = world.ask("append", "s", 2, rf=2)
    world.settle()
    world.kill(second)
    world.run(2.0)
    assert asked.answer is ErrorCode.WORKER_LOST
    again = world.ask("append", "s", 2, rf=2, again=asked)
    world.settle()
    assert again.answer == DONE
    assert len(world.copies("s")) == 2
    assert world.read("s") == (1, 2)
    world.kill(first)
    assert world.tell("get", "s") == 1
    assert world.read("s") == (1, 2)
