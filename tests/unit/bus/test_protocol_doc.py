"""docs/PROTOCOL.md says what the code does: its tables are read and compared, cell by cell."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

from bus import messages as m
from bus import sockets, wire
from bus.errors import BY_CODE

DOCUMENT = Path(__file__).parents[3] / "docs" / "PROTOCOL.md"
TEXT = DOCUMENT.read_text(encoding="utf-8")


def table(head: str) -> list[list[str]]:
    """The rows of the table whose first line begins with `head`, each a list of cells."""
    lines = TEXT.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith(head))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


MESSAGES = {row[0]: row for row in table("| message | opcode |")}
KINDS = {kind.__name__: kind for kind in wire.BY_OPCODE.values()}


def names_of(union: object) -> set[str]:
    return {kind.__name__ for kind in get_args(union)}


def test_the_table_has_every_message_with_its_opcode_and_no_other() -> None:
    assert {name: int(row[1]) for name, row in MESSAGES.items()} == {name: kind.opcode for name, kind in KINDS.items()}
    assert [int(row[1]) for row in MESSAGES.values()] == sorted(wire.BY_OPCODE)


@pytest.mark.parametrize("name", sorted(KINDS))
def test_payloads_are_as_many_as_the_message_may_have(name: str) -> None:
    least, most = KINDS[name].payloads
    assert MESSAGES[name][3] == (str(least) if least == most else f"{least}-{most}")


@pytest.mark.parametrize("name", sorted(KINDS))
def test_senders_and_receivers_are_those_of_the_unions(name: str) -> None:
    """The unions say who *hears* what from its own socket; the table says for whom it is meant, through the broker."""
    senders, receivers = ({end.strip() for end in side.split(",")} for side in MESSAGES[name][2].split("->"))
    relayed = names_of(m.Dispatched) | names_of(m.FollowUp)
    assert ("client" in senders) == (name in names_of(m.ToBroker))
    among_workers = names_of(m.ToHolder) | names_of(m.ToPuller)
    assert ("worker" in receivers) == (name in names_of(m.ToWorker) | relayed | among_workers)
    assert ("client" in receivers) == (name in names_of(m.ToClient) | names_of(m.OnStream))
    heard_by_broker = (names_of(m.ToBroker) - relayed) | names_of(m.WorkerToBroker)
    assert ("broker" in receivers) == (name in heard_by_broker)
    if name in names_of(m.WorkerToBroker) | among_workers:
        assert "worker" in senders


@pytest.mark.parametrize("name", sorted(KINDS))
def test_replies_are_messages_that_the_sender_may_hear(name: str) -> None:
    reply = MESSAGES[name][5]
    replies = re.findall(r"`(\w+)`", reply)
    assert bool(replies) == (reply not in {"", "none"})
    for answer in replies:
        receivers = {end.strip() for end in MESSAGES[answer][2].split("->")[1].split(",")}
        senders = {end.strip() for end in MESSAGES[name][2].split("->")[0].split(",")}
        assert senders <= receivers, (name, answer)


def test_every_request_has_a_reply_and_a_bad_end() -> None:
    for name in names_of(m.Dispatched):
        assert "`Failed`" in MESSAGES[name][5]
        assert MESSAGES[name][5].count("`") >= 4


def test_lanes_have_the_limits_that_are_documented() -> None:
    for name, *numbers in table("| lane | send HWM |"):
        lane: sockets.Lane = getattr(sockets, name)
        actual = [lane.send_hwm, lane.receive_hwm, lane.max_message_bytes, lane.queue_limit]
        assert [int(number) for number in numbers] == actual, name


def test_errors_are_those_of_the_code() -> None:
    assert [tuple(row) for row in table("| code | number |")] == [
        (code.name, str(int(code)), kind.__name__, "yes" if kind.retryable else "no")
        for code, kind in sorted(BY_CODE.items())
    ]


def test_the_frame_that_is_shown_is_what_is_sent() -> None:
    shown = re.search(r"`Beat\(beat=7\)` is `([0-9a-f ]+)`", TEXT)
    assert shown is not None
    assert bytes.fromhex(shown[1]) == wire.encode(m.Beat(beat=7))


def test_the_limits_of_a_header_are_those_that_are_documented() -> None:
    assert f"at most {wire.MAX_HEADER_BYTES:,} bytes" in TEXT
    assert f"prefix, {wire.PREFIX_BYTES} bytes" in TEXT
    assert m.MAX_PAYLOADS == 8
    assert "up to eight payload frames" in TEXT
    assert f"version {wire.MAJOR}.{wire.MINOR}" in TEXT
