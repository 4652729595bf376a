"""Named sequences while workers come and go, broker and workers as they are: what is read is never stale."""

from __future__ import annotations

from itertools import groupby

import pytest

from bus.errors import ErrorCode
from kvcache.ring import HashRing
from kvcache.routing.keys import sequence_key
from tests.unit import sequence_world
from tests.unit.sequence_world import DONE, USER, World, stale

NOT_FOUND = ErrorCode.NOT_FOUND
AWAY_S = 1.5  # longer than a worker may be silent


@pytest.fixture
def world() -> World:
    return World(("a", "b", "c"))


def away(world: World, name: str) -> None:
    """A worker freezes until the broker has given it up."""
    world.freeze(name)
    world.run(AWAY_S)


def check(world: World, reads: list[int | ErrorCode | None]) -> set[int | ErrorCode | None]:
    """What was read, of which nothing was stale."""
    for read in world.history:
        if read.kind == "get" and isinstance(read.answer, int) and not isinstance(read.answer, ErrorCode):
            assert stale(world.history, read) is None
    world.check()
    return set(reads)


def test_a_sequence_is_written_and_read_on_its_owner(world: World) -> None:
    owner = world.owner("s")
    assert world.tell("put", "s", 1) == DONE
    assert world.tell("get", "s") == 1
    assert world.workers[owner].store.stats(world.now).sequences == 1


def test_what_was_written_while_its_owner_was_away_is_read_when_the_owner_is_back(world: World) -> None:
    world.busy = set(world.workers)  # nothing moves to its owner yet
    owner = world.owner("s")
    world.kill(owner)
    assert world.tell("put", "s", 1, seconds=0.0) == DONE
    world.run(2.0)
    assert world.owner("s") != owner
    assert check(world, world.watch("s", 1.0)) == {1}
    assert world.tell("put", "s", 2) == DONE  # where the sequence is whole, not where it would begin anew
    assert check(world, world.watch("s", 0.5)) == {2}


def test_a_copy_that_was_rewritten_elsewhere_is_never_read_again_and_dropped(world: World) -> None:
    world.busy = set(world.workers)  # nothing moves to its owner yet
    owner = world.owner("s")
    world.tell("put", "s", 1)
    away(world, owner)
    assert world.tell("put", "s", 2) == DONE
    world.thaw(owner)
    assert check(world, world.watch("s", 2.0)) == {2, ErrorCode.NO_WORKERS}  # asked to wait while the owner tells
    assert world.workers[owner].store.stats(world.now).sequences == 0


def test_a_copy_whose_newer_version_is_lost_is_a_miss_and_not_an_answer(world: World) -> None:
    owner = world.owner("s")
    world.tell("put", "s", 1)
    away(world, owner)
    world.tell("put", "s", 2)
    world.kill(world.owner("s"))
    world.thaw(owner)
    assert 1 not in check(world, world.watch("s", 2.0))
    assert world.tell("get", "s") is NOT_FOUND


def test_a_copy_that_was_deleted_while_its_worker_was_away_does_not_come_back(world: World) -> None:
    owner = world.owner("s")
    world.tell("put", "s", 1)
    away(world, owner)
    assert world.tell("delete", "s") is NOT_FOUND  # nobody who could be asked has it
    world.tell("put", "t", 2)
    world.thaw(owner)
    assert check(world, world.watch("s", 2.0)) <= {NOT_FOUND, ErrorCode.NO_WORKERS}
    assert world.workers[owner].store.stats(world.now).sequences <= 1


def test_a_broker_that_starts_anew_learns_where_the_newest_copies_are_before_it_answers(world: World) -> None:
    world.busy = set(world.workers)  # nothing moves to its owner yet
    owner = world.owner("s")
    world.tell("put", "s", 1)
    away(world, owner)
    world.tell("put", "s", 2)
    world.thaw(owner)
    world.restart_broker()
    reads = check(world, world.watch("s", 3.0))
    assert reads <= {2, ErrorCode.NO_WORKERS}
    assert world.tell("get", "s") == 2
    assert world.workers[owner].store.stats(world.now).sequences == 0


def test_a_broker_that_starts_with_its_clock_an_hour_back_still_tells_newer_from_older(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.busy = set(world.workers)  # nothing moves to its owner yet
    owner = world.owner("s")
    world.tell("put", "s", 1)
    monkeypatch.setattr(sequence_world, "WALL_S", sequence_world.WALL_S - 3600)
    world.restart_broker()
    assert world.tell("get", "s") == 1
    away(world, owner)
    assert world.tell("put", "s", 2) == DONE
    world.thaw(owner)
    assert check(world, world.watch("s", 2.0)) == {2, ErrorCode.NO_WORKERS}
    assert world.workers[owner].store.stats(world.now).sequences == 0


def test_what_a_broker_learns_anew_includes_deletions(world: World) -> None:
    owner = world.owner("s")
    world.tell("put", "s", 1)
    away(world, owner)
    world.tell("put", "s", 2)
    assert world.tell("delete", "s") == DONE
    world.thaw(owner)
    world.restart_broker()
    assert check(world, world.watch("s", 3.0)) <= {NOT_FOUND, ErrorCode.NO_WORKERS}


def test_a_worker_that_joins_and_owns_a_sequence_does_not_hide_it(world: World) -> None:
    names = [f"s{number}" for number in range(40)]
    before = {name: world.owner(name) for name in names}
    for number, name in enumerate(names):
        assert world.tell("put", name, number) == DONE
    world.join("d")  # at once: what was written is known from its answers
    assert {name: world.owner(name) for name in names} == before
    assert [world.tell("get", name) for name in names] == list(range(40))
    assert "d" in {world.owner(f"new{number}") for number in range(40)}


def test_what_had_to_make_room_is_a_miss_and_its_older_copy_too() -> None:
    world = World(("a", "b"), num_pages=4)
    names = [name for name in (f"s{number}" for number in range(40)) if world.owner(name) == "a"][:4]
    world.tell("put", names[0], 1)
    away(world, "a")
    for number, name in enumerate(names):
        assert world.tell("put", name, 10 + number) == DONE  # two fit into b
    world.run(0.1)
    world.thaw("a")
    assert check(world, world.watch(names[0], 2.0)) <= {NOT_FOUND, ErrorCode.NO_WORKERS}
    assert world.tell("get", names[3]) == 13


def many(owner: str) -> tuple[World, list[str]]:
    """Two workers, and more names of one of them than it can tell in a tick: 256 on a page, eight pages."""
    world, ring = World(("a", "b"), num_pages=6000), HashRing({"a": 100, "b": 100})
    names = [name for name in (f"s{n}" for n in range(5000)) if ring.owner(sequence_key(USER, name).key) == owner]
    assert len(names) > 8 * 256
    return world, names


def test_reads_wait_for_a_worker_that_has_much_to_tell() -> None:
    world, names = many("a")
    for number, name in enumerate(names):
        assert world.tell("put", name, number) == DONE
    away(world, "a")
    world.thaw("a")
    reads = [read for read, _ in groupby(world.watch(names[-1], 2.0))]
    assert reads == [NOT_FOUND, ErrorCode.NO_WORKERS, len(names) - 1]
    check(world, [])


def test_a_broker_that_starts_anew_does_not_believe_the_first_worker_that_tells() -> None:
    world, names = many("b")
    mine = next(name for name in (f"t{n}" for n in range(100)) if world.owner(name) == "a")
    world.tell("put", mine, 1)
    for name in names:
        world.tell("put", name, 0)
    away(world, "a")
    world.tell("put", mine, 2)
    world.thaw("a")
    world.restart_broker()
    assert check(world, world.watch(mine, 3.0)) == {ErrorCode.NO_WORKERS, 2}


# --- two copies ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dies", ["the owner", "the other"])
def test_what_was_acknowledged_by_two_survives_one(world: World, dies: str) -> None:
    for number in range(30):
        name = f"r{number}"
        assert world.tell("put", name, 2 * number, rf=2) == DONE
        assert world.tell("put", name, 2 * number + 1, rf=2) == DONE
        holders, owner = world.copies(name), world.owner(name)
        assert len(holders) == 2
        world.kill(owner if dies == "the owner" else next(iter(holders - {owner})))
        assert world.tell("get", name) == 2 * number + 1


def test_both_copies_stay_when_a_later_write_asks_for_one(world: World) -> None:
    world.tell("put", "s", 1, rf=2)
    world.tell("put", "s", 2)
    world.run(1.0)
    assert len(world.copies("s")) == 2
    world.kill(world.owner("s"))
    assert world.tell("get", "s") == 2


def test_a_write_of_which_one_copy_froze_is_not_acknowledged_and_the_frozen_one_never_read(world: World) -> None:
    world.busy = set(world.workers)  # nothing moves to its owner yet
    world.tell("put", "s", 1, rf=2)
    frozen = world.owner("s")
    world.freeze(frozen)
    assert world.tell("put", "s", 2, rf=2, seconds=2.0) == DONE  # on the other and on a new second one
    world.thaw(frozen)
    reads = check(world, world.watch("s", 2.0))
    assert reads == {2, ErrorCode.NO_WORKERS}
    assert world.copies("s").isdisjoint({frozen})


def test_a_write_that_has_room_on_one_worker_only_leaves_no_two_copies_that_differ() -> None:
    """Although a pin that was in flight with it gave both of them one version."""
    world = World(("a", "b"), num_pages=8)  # of each; a sequence takes two
    assert world.tell("put", "s", 1, rf=2) == DONE
    fillers = [name for name in (f"t{number}" for number in range(40)) if world.owner(name) == "b"][:3]
    for name in fillers:
        assert (world.tell("put", name, 0), world.tell("pin", name)) == (DONE, DONE)
    written, pinned = world.ask("put", "s", 2, rf=2), world.ask("pin", "s")
    world.settle()
    assert (written.answer, pinned.answer) == (ErrorCode.NO_SPACE, DONE)
    reads = [world.tell("get", "s") for _ in range(4)]
    assert reads in ([1] * 4, [2] * 4)
    assert world.tell("delete", fillers[0]) == DONE
    world.run(5.0)
    assert world.copies("s") == {"a", "b"}, "the other one is made anew without another write"
    assert [world.tell("get", "s") for _ in range(4)] == reads
    world.check()


def test_a_write_that_comes_when_its_session_is_over_makes_no_copy_another(world: World) -> None:
    assert world.tell("put", "s", 1, rf=2) == DONE
    late, other = sorted(world.copies("s"))
    given_up = world.ask("put", "s", 2, rf=2)
    on_its_way = world.workers[late].bulk
    assert on_its_way
    world.workers[late].bulk, world.workers[other].bulk = [], []
    away(world, late)
    world.thaw(late)
    world.run(1.0)
    assert given_up.answer is ErrorCode.WORKER_LOST
    assert world.tell("put", "s", 3, rf=2) == DONE
    assert late in world.copies("s")
    world.workers[late].bulk += on_its_way
    world.settle()
    assert [world.tell("get", "s") for _ in range(4)] == [3] * 4
    assert len(world.stored("s")) == 1
    world.check()


def test_a_deletion_removes_both_copies(world: World) -> None:
    world.tell("put", "s", 1, rf=2)
    assert world.tell("delete", "s") == DONE
    assert world.copies("s") == set()


def test_two_copies_are_two_to_a_broker_that_starts_anew(world: World) -> None:
    world.tell("put", "s", 1, rf=2)
    world.tell("put", "s", 2, rf=2)
    world.restart_broker()
    assert world.tell("get", "s") == 2
    world.run(1.0)
    assert len(world.copies("s")) == 2
    assert world.tell("put", "s", 3, rf=2) == DONE
    world.kill(world.owner("s"))
    assert world.tell("get", "s") == 3


# --- prompts -------------------------------------------------------------------------------------


def test_a_broker_that_starts_anew_knows_within_two_seconds_what_its_workers_hold() -> None:
    world = World(("a", "b"))
    for number, name in enumerate(world.workers):
        world.hold(name, ((100_000 * number + node).to_bytes(8, "big") for node in range(50_000)))
    world.run(3.0)
    assert world.indexed() == {"a": ("exact", 50_000), "b": ("exact", 50_000)}
    world.restart_broker()
    assert world.indexed() == {}
    world.run(2.0)
    assert world.indexed() == {"a": ("exact", 50_000), "b": ("exact", 50_000)}
