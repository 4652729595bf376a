"""Topics that cannot be guessed or shortened, and six addresses behind one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus.endpoints import DEFAULT_URL, Endpoints, endpoints
from bus.errors import BadArgument
from bus.topics import TOPIC_BYTES, stream_of, topic_of


@given(st.binary(min_size=16, max_size=16))
def test_a_topic_names_its_stream_and_has_the_one_length(stream_id: bytes) -> None:
    assert len(topic_of(stream_id)) == TOPIC_BYTES == 18
    assert stream_of(topic_of(stream_id)) == stream_id


@given(st.binary(max_size=24))
def test_no_other_bytes_are_a_topic(topic: bytes) -> None:
    is_topic = len(topic) == TOPIC_BYTES and topic.startswith(b"S|")
    assert (stream_of(topic) is not None) == is_topic


@given(st.binary(min_size=16, max_size=16), st.integers(0, TOPIC_BYTES - 1), st.binary(min_size=1, max_size=3))
def test_neither_a_prefix_nor_an_extension_of_a_topic_is_one(stream_id: bytes, length: int, more: bytes) -> None:
    assert stream_of(topic_of(stream_id)[:length]) is None
    assert stream_of(topic_of(stream_id) + more) is None


def test_a_tcp_address_names_six_consecutive_ports() -> None:
    at = endpoints("tcp://127.0.0.1:5555")
    assert at == Endpoints("tcp://127.0.0.1:5555", *(f"tcp://127.0.0.1:{port}" for port in range(5555, 5561)))
    assert endpoints(DEFAULT_URL) == at


def test_an_ipc_address_names_six_files() -> None:
    at = endpoints("ipc:///run/cache")
    assert (at.control, at.tokens) == ("ipc:///run/cache.0", "ipc:///run/cache.5")
    assert len({at.control, at.bulk, at.streams, at.worker_control, at.worker_bulk, at.tokens}) == 6


def test_the_short_scheme_means_tcp() -> None:
    assert endpoints("kvc://host:7000/").control == "tcp://host:7000"


def test_an_ipv6_address_keeps_its_brackets() -> None:
    assert endpoints("tcp://[::1]:5555").tokens == "tcp://[::1]:5560"


def test_the_highest_port_leaves_room_for_the_other_five() -> None:
    assert endpoints("tcp://h:65530").tokens == "tcp://h:65535"
    with pytest.raises(BadArgument, match="1 to 65530"):
        endpoints("tcp://h:65531")


@pytest.mark.parametrize(
    "url",
    [
        *(
            "",
            "127.0.0.1:5555",
            "http://h:1",
            "tcp://",
            "tcp://h",
            "tcp://h:",
            "tcp://:5555",
            "tcp://h:0",
            "tcp://h:-1",
        ),
        *("tcp://h\ud800:5555", "tcp://h\0:5555", "tcp://h:5555\n", "ipc:///tmp/a\0b"),
        *("tcp://h:99999", "tcp://h:5555.0", "tcp://h:x", "tcp://h:" + "9" * 5000, "ipc://", "inproc://x", "kvc:/h:1"),
    ],
)
def test_other_addresses_are_refused_with_what_would_be_right(url: str) -> None:
    with pytest.raises(BadArgument, match=r"not of the form|needs a host and a port"):
        endpoints(url)
