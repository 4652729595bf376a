"""API keys: kept as hashes, compared whole, and each with a cache of its own."""

from __future__ import annotations

import pytest

from bus.errors import BadArgument, Unauthenticated
from kvcache.gateway.access import Keys, hash_key, isolation_salt, read_keys
from kvcache.gateway.config import GatewayConfig, config_from, public_view

KEY, OTHER = "kvc-first-key", "kvc-second-key"


def test_a_key_is_known_plain_or_hashed_and_comments_are_not_keys() -> None:
    keys = read_keys([KEY], ["# ours", "", f"{hash_key(OTHER)}  # of team two", KEY])
    assert len(keys) == 2
    assert keys.check(f"Bearer {KEY}") != keys.check(f"bearer  {OTHER} ")


def test_nothing_that_is_kept_shows_the_key() -> None:
    assert KEY not in hash_key(KEY)
    assert KEY not in repr(vars(read_keys([KEY], [])))
    assert KEY not in str(public_view(GatewayConfig(api_key=(KEY,))))


@pytest.mark.parametrize("header", [None, "", KEY, f"Basic {KEY}", "Bearer", "Bearer ", "Bearer wrong", "Bearer \xff"])
def test_a_missing_or_unknown_key_is_refused(header: str | None) -> None:
    with pytest.raises(Unauthenticated, match="API key"):
        read_keys([KEY], []).check(header)


def test_a_hash_is_no_key() -> None:
    with pytest.raises(Unauthenticated):
        read_keys([KEY], []).check(f"Bearer {hash_key(KEY)}")


def test_without_keys_everybody_may_call() -> None:
    assert Keys().check(None) == b""


@pytest.mark.parametrize(
    ("line", "words"), [("short", "line 2.*8 are needed"), ("sha256:12", "hash"), ("sha256:x", "hash")]
)
def test_a_line_that_is_no_key_is_named(line: str, words: str) -> None:
    with pytest.raises(BadArgument, match=words):
        read_keys([], [KEY, line])


def test_a_salt_is_the_keys_own_and_fits_the_bus() -> None:
    assert isolation_salt(b"", "x") == "x"
    assert isolation_salt(b"", None) is None
    salt = isolation_salt(b"k", "\ud800" * 1000)
    assert salt is not None
    assert (salt.isascii(), len(salt)) == (True, 48)


def test_flags_win_over_the_environment_and_lists_may_have_commas() -> None:
    env = {
        "KVCACHE_GATEWAY_PORT": "9000",
        "KVCACHE_GATEWAY_PING_S": "2.5",
        "KVCACHE_GATEWAY_API_KEY": f"{KEY}, {OTHER}",
    }
    config = config_from({"port": "9001"}, env)
    assert (config.port, config.ping_s, config.api_key) == (9001, 2.5, (KEY, OTHER))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"port": "http"}, "--port must be a whole number"),
        ({"port": "70000"}, "port must be from 0 to 65535"),
        ({"ping_s": "nan"}, "ping_s must be from"),
        ({"body_timeout_s": "x"}, "--body-timeout-s must be a number"),
        ({"broker": "http://x"}, "http://x"),
        ({"log_format": "xml"}, "xml"),
    ],
)
def test_a_value_that_cannot_be_is_named(given: dict[str, str], words: str) -> None:
    with pytest.raises(BadArgument, match=words):
        config_from(given, {})
