"""What a worker process is told at its start: flags, `KVCACHE_*` variables, defaults, in this order.

Parsed once by `parse_config`, checked in `__post_init__`, passed down. Nothing here is derived from the
hardware or a model; how the memory is shared out is a plan, made by `plan_memory`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from bus.endpoints import DEFAULT_URL, endpoints
from bus.errors import BadArgument
from bus.security import is_local
from kvcache.models import DEFAULT_HOME
from workers.eviction import EVICTION_POLICIES, EvictionPolicy

GIB = 1 << 30
PLANE_SHARE = 4  # the KV plane gets one part in this many, unless told otherwise
MIN_PART_BYTES = 1 << 20

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["text", "json"]
DTypeChoice = Literal["auto", "float32", "bfloat16", "float16"]
KVDTypeChoice = Literal["auto", "float32", "bfloat16", "float16", "int8", "fp8"]
RunnerChoice = Literal["auto", "torch", "openvino"]
WeightsChoice = Literal["auto", "int8"]
AttentionChoice = Literal["auto", "gather", "flex"]

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.ASCII | re.IGNORECASE)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_FAILPOINT = re.compile(r"[a-z_.]+:(kill9|stop|corrupt|drop)@[1-9]\d{0,8}", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """Raises BadArgument, naming the flag, for a value out of its range.

    models: names, folders, GGUF files or hub ids; the first is the default. None named: any in the registry may load.
    kv_cache_memory_bytes: hard cap over all KV memory, the models' block pools and the KV plane together.
    kv_plane_bytes: the KV plane's part of it; None: a quarter.
    model_memory_bytes: hard cap over weights and block pools of all loaded models; None: weights are not counted.
    max_model_len: tokens of a sequence; None: what the model allows.
    kv_events, kv_events_replay: addresses to tell block events at, in vLLM's schema; empty for nowhere.
    audit: the part of found blocks that is computed again and compared; 0 for none.
    failpoint: `NAME:ACTION@N` harms the process when it reaches point NAME the Nth time; see `workers.failpoints`.
    """

    brokers: tuple[str, ...] = (DEFAULT_URL,)
    worker_id: str
    weight: int = 100
    models: tuple[str, ...] = ()
    preload: bool = True
    home: Path = DEFAULT_HOME
    kv_cache_memory_bytes: int = GIB
    kv_plane_bytes: int | None = None
    model_memory_bytes: int | None = None
    block_size: int = 32
    dtype: DTypeChoice = "auto"
    kv_dtype: KVDTypeChoice = "auto"
    device: str = "auto"
    runner: RunnerChoice = "auto"
    weights: WeightsChoice = "auto"
    attention: AttentionChoice = "auto"
    cuda_graphs: bool = False
    max_model_len: int | None = None
    max_num_batched_tokens: int = 256
    max_num_seqs: int = 64
    enable_prefix_caching: bool = True
    eviction_policy: EvictionPolicy = "lru"
    audit: float = 0.0
    kv_events: str = ""
    kv_events_replay: str = ""
    threads: int | None = None
    log_level: LogLevel = "info"
    log_format: LogFormat = "text"
    failpoint: str = ""

    def __post_init__(self) -> None:
        if not self.brokers or len(set(self.brokers)) != len(self.brokers):
            raise BadArgument(f"--broker needs one or more different addresses, not {list(self.brokers)}")
        for url in self.brokers:
            endpoints(url)
        if not self.worker_id.isprintable() or not 1 <= len(self.worker_id) <= 128:
            raise BadArgument(f"--worker-id must be 1 to 128 printable characters, not {self.worker_id[:140]!r}")
        _check_range("--weight", self.weight, 1, 1000)
        _check_range("--kv-cache-memory-bytes", self.kv_cache_memory_bytes, 4 * MIN_PART_BYTES, 1 << 50)
        _check_range("--block-size", self.block_size, 1, 1024)
        _check_range("--max-num-batched-tokens", self.max_num_batched_tokens, 1, 1 << 20)
        _check_range("--max-num-seqs", self.max_num_seqs, 1, 1 << 16)
        if self.max_model_len is not None:
            _check_range("--max-model-len", self.max_model_len, 2, 1 << 24)
        if self.threads is not None:
            _check_range("--threads", self.threads, 1, 1024)
        if self.kv_plane_bytes is not None:
            most = self.kv_cache_memory_bytes - MIN_PART_BYTES
            _check_range("--kv-plane-bytes", self.kv_plane_bytes, MIN_PART_BYTES, most)
        _check_choice("--eviction-policy", self.eviction_policy, EVICTION_POLICIES)
        if not 0 <= self.audit <= 1:
            raise BadArgument(f"--audit must be from 0 to 1, not {self.audit}")
        if self.kv_events:
            is_local(self.kv_events)
            if len(self.models) != 1:
                raise BadArgument("--kv-events needs exactly one --model, because events do not say which they are of")
        if self.kv_events_replay:
            is_local(self.kv_events_replay)
            if not self.kv_events:
                raise BadArgument("--kv-events-replay needs --kv-events")
        if self.model_memory_bytes is not None:
            _check_range("--model-memory-bytes", self.model_memory_bytes, MIN_PART_BYTES, 1 << 50)
        _check_choice("--dtype", self.dtype, get_args(DTypeChoice))
        _check_choice("--kv-dtype", self.kv_dtype, get_args(KVDTypeChoice))
        _check_choice("--runner", self.runner, get_args(RunnerChoice))
        _check_choice("--weights", self.weights, get_args(WeightsChoice))
        _check_choice("--attention", self.attention, get_args(AttentionChoice))
        if self.runner == "openvino" and self.attention != "auto":
            raise BadArgument(f"--attention {self.attention} is for --runner torch; OpenVINO has its own")
        _check_choice("--log-level", self.log_level, get_args(LogLevel))
        _check_choice("--log-format", self.log_format, get_args(LogFormat))
        if self.failpoint and not _FAILPOINT.fullmatch(self.failpoint):
            raise BadArgument(f"KVCACHE_FAILPOINT {self.failpoint!r} is not of the form NAME:kill9|stop|corrupt|drop@N")


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """The cap, shared out: bytes of the KV plane, and bytes for all block pools together."""

    kv_plane_bytes: int
    pools_bytes: int


def plan_memory(config: WorkerConfig) -> MemoryPlan:
    """How the hard cap divides between the KV plane and the models' block pools."""
    plane = config.kv_plane_bytes or config.kv_cache_memory_bytes // PLANE_SHARE
    return MemoryPlan(kv_plane_bytes=plane, pools_bytes=config.kv_cache_memory_bytes - plane)


def parse_config(argv: Sequence[str], env: Mapping[str, str], default_worker_id: str) -> WorkerConfig:
    """The configuration that flags and `KVCACHE_*` variables describe; a flag wins over its variable.

    Raises BadArgument for a value that is wrong; argparse exits with status 2 for a flag that is unknown.
    """
    flags = _parser().parse_args(argv)

    def given(name: str) -> str | None:
        value = getattr(flags, name)
        return value if value is not None else env.get(f"KVCACHE_{name.upper()}")

    def listed(name: str) -> tuple[str, ...]:
        value = getattr(flags, name)
        return tuple(value) if value else tuple(filter(None, env.get(f"KVCACHE_{name.upper()}", "").split(",")))

    preload = given("preload")
    caching = given("enable_prefix_caching")
    graphs = given("cuda_graphs")
    return WorkerConfig(
        brokers=listed("broker") or (DEFAULT_URL,),
        worker_id=given("worker_id") or default_worker_id,
        weight=_integer("--weight", given("weight"), 100),
        models=listed("model"),
        preload=True if preload is None else _boolean("--preload", preload),
        home=Path(env.get("KVCACHE_HOME") or DEFAULT_HOME),
        kv_cache_memory_bytes=parse_bytes("--kv-cache-memory-bytes", given("kv_cache_memory_bytes") or "1GiB"),
        kv_plane_bytes=_optional(parse_bytes, "--kv-plane-bytes", given("kv_plane_bytes")),
        model_memory_bytes=_optional(parse_bytes, "--model-memory-bytes", given("model_memory_bytes")),
        block_size=_integer("--block-size", given("block_size"), 32),
        dtype=given("dtype") or "auto",  # type: ignore[arg-type]  # __post_init__ checks the choice
        kv_dtype=given("kv_dtype") or "auto",  # type: ignore[arg-type]  # as above
        device=given("device") or "auto",
        runner=given("runner") or "auto",  # type: ignore[arg-type]  # as above
        weights=given("weights") or "auto",  # type: ignore[arg-type]  # as above
        attention=given("attention") or "auto",  # type: ignore[arg-type]  # as above
        cuda_graphs=False if graphs is None else _boolean("--cuda-graphs", graphs),
        max_model_len=_optional(_integer, "--max-model-len", given("max_model_len")),
        max_num_batched_tokens=_integer("--max-num-batched-tokens", given("max_num_batched_tokens"), 256),
        max_num_seqs=_integer("--max-num-seqs", given("max_num_seqs"), 64),
        enable_prefix_caching=True if caching is None else _boolean("--enable-prefix-caching", caching),
        eviction_policy=given("eviction_policy") or "lru",  # type: ignore[arg-type]  # as above
        audit=_share("--audit", given("audit")),
        kv_events=given("kv_events") or "",
        kv_events_replay=given("kv_events_replay") or "",
        threads=_optional(_integer, "--threads", given("threads")),
        log_level=given("log_level") or "info",  # type: ignore[arg-type]  # as above
        log_format=given("log_format") or "text",  # type: ignore[arg-type]  # as above
        failpoint=env.get("KVCACHE_FAILPOINT", ""),
    )


def parse_bytes(flag: str, text: str) -> int:
    """Bytes in `1073741824`, `1GiB`, `1.5G` (powers of 1024) or `1GB` (of 1000). Raises BadArgument."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise BadArgument(f"{flag} {text!r} is not a size; write 512MiB, 1GiB or a number of bytes")
    number, prefix, binary = match.groups()
    is_decimal = not binary and text.strip().upper().endswith("B") and prefix
    return int(float(number) * (1000 if is_decimal else 1024) ** _POWERS[prefix.upper()])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kvcache worker",
        description="A worker: runs models, keeps their KV in blocks, and serves the KV plane. "
        "Each flag may also be set by an environment variable, KVCACHE_ and its name in capitals.",
    )
    add = parser.add_argument
    add("--broker", action="append", metavar="URL", help=f"a broker's address; may be repeated (default {DEFAULT_URL})")
    model = (
        "serve this: a name, a folder, a .gguf file, or a hub's org/name, org/name@revision or org/name/file.gguf; may "
        "be repeated, the first is the default (default: any that is here, the built-in one if a request names none)"
    )
    add("--model", action="append", metavar="NAME|PATH", help=model)
    add("--preload", action=argparse.BooleanOptionalAction, help="load the named models at start (default) or later")
    add("--worker-id", metavar="ID", help="name on the ring (default host-pid-random)")
    add("--weight", metavar="N", help="share of the ring relative to others, 1 to 1000 (default 100)")
    add("--kv-cache-memory-bytes", metavar="SIZE", help="hard cap on all KV memory (default 1GiB)")
    add("--kv-plane-bytes", metavar="SIZE", help="the KV plane's part of it (default a quarter)")
    model_memory = (
        "hard cap on weights and block pools of all loaded models; the least recently used leaves for one that has no "
        "room (default: only their pools are capped)"
    )
    add("--model-memory-bytes", metavar="SIZE", help=model_memory)
    add("--block-size", metavar="TOKENS", help="tokens per block of KV (default 32)")
    add("--dtype", metavar="NAME", help="auto, float32, bfloat16 or float16 (default auto)")
    add("--kv-dtype", metavar="NAME", help="of the pool: auto (the model's), float32, bfloat16, float16, int8 or fp8")
    add("--device", metavar="NAME", help="auto, cpu or cuda (default auto)")
    add("--runner", metavar="NAME", help="torch, openvino, or auto: OpenVINO on a CPU, where it can (default auto)")
    add("--weights", metavar="NAME", help="auto: the model's own (default), or int8: rounded, OpenVINO only")
    attention = (
        "of the torch runner: gather, flex (one compiled kernel that reads the pool), or auto: flex on a GPU if it "
        "proves right there, else gather (default auto)"
    )
    add("--attention", metavar="NAME", help=attention)
    graphs = "record decode steps of flex attention on a GPU as CUDA graphs, and replay them (default: no)"
    add("--cuda-graphs", action=argparse.BooleanOptionalAction, help=graphs)
    add("--max-model-len", metavar="TOKENS", help="longest sequence (default: the model's own limit)")
    add("--max-num-batched-tokens", metavar="N", help="tokens computed per step at most (default 256)")
    add("--max-num-seqs", metavar="N", help="sequences computed per step at most (default 64)")
    add("--enable-prefix-caching", action=argparse.BooleanOptionalAction, help="share KV by prefix (default)")
    add("--eviction-policy", metavar="NAME", help="which cached block goes first: lru (default), lfu or cost")
    add("--audit", metavar="SHARE", help="compute this part of found blocks again and compare, 0 to 1 (default 0)")
    kv_events = (
        "tell block events here in vLLM's schema, for other routers: tcp://127.0.0.1:5657, say (default: nowhere)"
    )
    add("--kv-events", metavar="URL", help=kv_events)
    add("--kv-events-replay", metavar="URL", help="where they ask for what they missed (default: nowhere)")
    add("--threads", metavar="N", help="threads of one model step (default: the runner decides)")
    add("--log-level", metavar="LEVEL", help="debug, info, warning or error (default info)")
    add("--log-format", metavar="FORMAT", help="text or json (default text)")
    return parser


def _check_range(flag: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise BadArgument(f"{flag} must be from {low} to {high}, not {value}")


def _check_choice(flag: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise BadArgument(f"{flag} must be one of {', '.join(choices)}, not {value!r}")


def _integer(flag: str, text: str | None, default: int = 0) -> int:
    if text is None:
        return default
    try:
        return int(text)
    except ValueError:
        raise BadArgument(f"{flag} must be a whole number, not {text!r}") from None


def _share(flag: str, text: str | None) -> float:
    try:
        return float(text or 0)
    except ValueError:
        raise BadArgument(f"{flag} must be a number from 0 to 1, not {text!r}") from None


def _boolean(flag: str, value: str | bool) -> bool:
    if isinstance(value, bool):
        return value
    known = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    if value.lower() not in known:
        raise BadArgument(f"{flag} must be true or false, not {value!r}")
    return known[value.lower()]


def _optional(parse: Callable[[str, str], int], flag: str, text: str | None) -> int | None:
    return None if text is None else parse(flag, text)
