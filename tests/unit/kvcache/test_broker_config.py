"""The broker's flags and variables: a value that makes no sense is an error that names it."""

from __future__ import annotations

import pytest

from bus.errors import BadArgument
from kvcache.config import BrokerConfig, parse_broker_config


def test_defaults_stand_where_nothing_is_given() -> None:
    assert parse_broker_config([], {}) == BrokerConfig()
    assert BrokerConfig().policy == "prefix"


def test_a_flag_wins_over_a_variable_and_a_variable_over_the_default() -> None:
    env = {"KVCACHE_BROKER_MAX_INFLIGHT": "7", "KVCACHE_BROKER_LOG_FORMAT": "json", "KVCACHE_BROKER_NOTHING": "x"}
    config = parse_broker_config(["--max-inflight", "9", "--bind", "ipc:///run/x"], env)
    assert (config.max_inflight, config.log_format, config.bind) == (9, "json", "ipc:///run/x")


@pytest.mark.parametrize(
    ("argv", "env", "words"),
    [
        (["--max-inflight", "many"], {}, "--max-inflight must be a whole number, not 'many'"),
        (["--drain-ms", "1.5"], {}, "--drain-ms must be a whole number"),
        ([], {"KVCACHE_BROKER_LEASE_MS": ""}, "KVCACHE_BROKER_LEASE_MS must be a whole number, not ''"),
        (["--max-inflight", "0"], {}, "max_inflight must be from 1 to"),
        (["--heartbeat-ms", "0"], {}, "heartbeat_ms must be from 1"),
        (["--settle-ms", "-1"], {}, "settle_ms must be from 0"),
        (["--lease-ms", "1001"], {}, "lease_ms 1001 must not be above worker_lost_ms 1000"),
        (["--lease-ms", "700"], {}, "lease_ms must be from three heartbeats, 750"),
        (["--worker-lost-ms", "749"], {}, "worker_lost_ms must be from three heartbeats, 750"),
        (["--client-lost-ms", "10"], {}, "client_lost_ms must be from three heartbeats, 750"),
        (["--drain-ms", "999999999999"], {}, "drain_ms must be from 0 to 604800000"),
        (["--policy", "random"], {}, "policy 'random' does not exist; use one of"),
        (["--security", "tls"], {}, "security mode 'tls' does not exist"),
        (["--bind", "tcp://127.0.0.1"], {}, "needs a host and a port"),
        (["--log-format", "xml"], {}, "log format 'xml' is neither 'text' nor 'json'"),
    ],
)
def test_a_value_that_makes_no_sense_is_named(argv: list[str], env: dict[str, str], words: str) -> None:
    with pytest.raises(BadArgument) as caught:
        parse_broker_config(argv, env)
    assert words in str(caught.value)


def test_an_unknown_flag_ends_with_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_broker_config(["--nothing"], {})
    assert caught.value.code == 2
    assert "unrecognized arguments: --nothing" in capsys.readouterr().err


def test_help_names_every_flag_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_broker_config(["--help"], {})
    text = " ".join(capsys.readouterr().out.split())
    for flag, default in {
        "--bind": "tcp://127.0.0.1:5555",
        "--max-inflight": "512",
        "--policy": "prefix",
    }.items():
        assert flag in text
        assert f"[{default}]" in text
