"""Without keys, nobody but this machine gets in."""

from __future__ import annotations

import pytest

from bus.errors import BadArgument, Forbidden
from bus.security import SecurityConfig, is_local


@pytest.mark.parametrize(
    "endpoint",
    ["tcp://127.0.0.1:5555", "tcp://127.8.9.1:1", "tcp://localhost:5555", "tcp://[::1]:5555", "ipc:///run/x"],
)
def test_loopback_and_ipc_may_be_bound_without_keys(endpoint: str) -> None:
    SecurityConfig().check_bind(endpoint)


@pytest.mark.parametrize(
    "endpoint",
    [
        *("tcp://0.0.0.0:5555", "tcp://*:5555", "tcp://[::]:5555", "tcp://10.0.0.1:5555", "tcp://eth0:5555"),
        *(
            "tcp://localhost.example.com:5555",
            "tcp://127.0.0.1.example.com:1",
            "tcp://[::ffff:0.0.0.0]:1",
            "tcp://:5555",
        ),
        *("tcp://127.0.0.1:1;0.0.0.0:5555", "tcp://0.0.0.0:1;127.0.0.1:5555", "tcp://2130706433:1", "tcp://0:1"),
    ],
)
def test_any_other_bind_is_refused_with_what_to_do_instead(endpoint: str) -> None:
    with pytest.raises(Forbidden, match=r"refusing to bind .*Bind tcp://127\.0\.0\.1:PORT or ipc://"):
        SecurityConfig().check_bind(endpoint)


@pytest.mark.parametrize("endpoint", ["127.0.0.1:5555", "", "tcp://", "udp://127.0.0.1:1", "pgm://127.0.0.1:1"])
def test_an_address_that_cannot_be_judged_is_an_error_and_no_yes(endpoint: str) -> None:
    with pytest.raises(BadArgument):
        is_local(endpoint)


@pytest.mark.parametrize("mode", ["curve", "", "None", None])
def test_a_mode_that_does_not_exist_is_refused(mode: object) -> None:
    with pytest.raises(BadArgument, match="use 'none'"):
        SecurityConfig(mode=mode)  # type: ignore[arg-type]  # what a configuration file may say
