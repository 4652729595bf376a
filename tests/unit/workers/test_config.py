"""The worker's configuration: flags before variables before defaults; wrong values are named, never replaced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from bus.errors import BadArgument
from workers.config import GIB, WorkerConfig, parse_bytes, parse_config, plan_memory


def parsed(argv: Sequence[str] = (), env: Mapping[str, str] | None = None) -> WorkerConfig:
    return parse_config(argv, env or {}, "host-1-ab")


def test_nothing_given_means_the_defaults() -> None:
    assert parsed() == WorkerConfig(worker_id="host-1-ab")


def test_a_flag_wins_over_its_variable_and_a_variable_over_the_default() -> None:
    env = {"KVCACHE_WEIGHT": "7", "KVCACHE_BLOCK_SIZE": "16", "KVCACHE_MODEL": "a,b"}
    config = parsed(["--weight", "9", "--broker", "tcp://127.0.0.1:6000", "--broker", "ipc:///tmp/b"], env)
    assert (config.weight, config.block_size, config.models) == (9, 16, ("a", "b"))
    assert config.brokers == ("tcp://127.0.0.1:6000", "ipc:///tmp/b")


def test_policy_and_audit_of_the_prefix_cache_are_read() -> None:
    config = parsed(["--eviction-policy", "cost"], {"KVCACHE_AUDIT": "0.01"})
    assert (config.eviction_policy, config.audit) == ("cost", 0.01)


def test_switches_can_be_turned_off_by_flag_and_by_variable() -> None:
    assert not parsed(["--no-preload"]).preload
    assert not parsed(["--no-enable-prefix-caching"]).enable_prefix_caching
    assert not parsed(env={"KVCACHE_PRELOAD": "false"}).preload
    assert parsed(["--preload"], {"KVCACHE_PRELOAD": "0"}).preload
    assert parsed(["--cuda-graphs"]).cuda_graphs
    assert not parsed(["--no-cuda-graphs"], {"KVCACHE_CUDA_GRAPHS": "1"}).cuda_graphs


@pytest.mark.parametrize(
    ("text", "size"),
    [("1GiB", GIB), ("1g", GIB), ("1GB", 10**9), ("1.5 MiB", 3 << 19), ("4096", 4096), ("4096B", 4096)],
)
def test_sizes_are_read_in_their_usual_forms(text: str, size: int) -> None:
    assert parse_bytes("--x", text) == size


@pytest.mark.parametrize(
    ("argv", "flag"),
    [
        (["--kv-cache-memory-bytes", "lots"], "--kv-cache-memory-bytes"),
        (["--kv-cache-memory-bytes", "1KiB"], "--kv-cache-memory-bytes"),
        (["--kv-cache-memory-bytes", "1GiB", "--kv-plane-bytes", "1GiB"], "--kv-plane-bytes"),
        (["--kv-events", "tcp://127.0.0.1:5557"], "exactly one --model"),
        (["--kv-events", "tcp://127.0.0.1:5557", "--model", "a", "--model", "b"], "exactly one --model"),
        (["--kv-events", "5557", "--model", "a"], "'5557' is not of the form"),
        (["--kv-events-replay", "tcp://127.0.0.1:5558"], "needs --kv-events"),
        (["--weight", "0"], "--weight"),
        (["--weight", "many"], "--weight"),
        (["--block-size", "0"], "--block-size"),
        (["--dtype", "int4"], "--dtype"),
        (["--kv-dtype", "int4"], "--kv-dtype"),
        (["--runner", "walker"], "--runner"),
        (["--attention", "divided"], "--attention"),
        (["--attention", "flex", "--runner", "openvino"], "--attention flex is for --runner torch"),
        (["--eviction-policy", "random"], "--eviction-policy"),
        (["--audit", "1.5"], "--audit"),
        (["--audit", "-0.1"], "--audit"),
        (["--audit", "nan"], "--audit"),
        (["--audit", "some"], "--audit"),
        (["--threads", "0"], "--threads"),
        (["--max-model-len", "1"], "--max-model-len"),
        (["--max-num-batched-tokens", "0"], "--max-num-batched-tokens"),
        (["--max-num-seqs", "0"], "--max-num-seqs"),
        (["--log-level", "loud"], "--log-level"),
        (["--log-format", "xml"], "--log-format"),
        (["--worker-id", "a\nb"], "--worker-id"),
        (["--broker", "nonsense"], "nonsense"),
        (["--broker", "tcp://a:1", "--broker", "tcp://a:1"], "--broker"),
    ],
)
def test_a_wrong_value_is_an_error_that_names_its_flag(argv: list[str], flag: str) -> None:
    with pytest.raises(BadArgument, match=flag):
        parsed(argv)


def test_a_variable_that_cannot_be_read_is_an_error_too() -> None:
    with pytest.raises(BadArgument, match="--preload"):
        parsed(env={"KVCACHE_PRELOAD": "perhaps"})
    with pytest.raises(BadArgument, match="KVCACHE_FAILPOINT"):
        parsed(env={"KVCACHE_FAILPOINT": "somewhere"})


def test_the_cap_covers_the_kv_plane_and_the_pools_together() -> None:
    for config in (parsed(["--kv-cache-memory-bytes", "64MiB"]), parsed(["--kv-plane-bytes", "3MiB"])):
        plan = plan_memory(config)
        assert plan.kv_plane_bytes + plan.pools_bytes == config.kv_cache_memory_bytes
    assert plan_memory(parsed()).kv_plane_bytes == GIB // 4
