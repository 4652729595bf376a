"""Named sequences when workers leave and die: what is to outlive them is copied first, and never a stale version."""

from __future__ import annotations

import itertools

import pytest

from bus.errors import ErrorCode
from tests.unit.sequence_world import DONE, World


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
    (other,) = [name for name in world.workers if name != owner and world.workers[name].inbox]
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
