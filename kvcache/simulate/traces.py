"""Traces: requests with their times, lengths and prefixes, from files of several formats.

Mooncake JSONL: one object a line with `timestamp` (ms), `input_length`, `output_length` and `hash_ids`, chained ids
of 512-token blocks (Qin et al., FAST '25). Recorded JSONL: what `kvcache record` wrote. Azure CSV: `TIMESTAMP`,
`ContextTokens`, `GeneratedTokens` and no prefixes, for which `synthetic.with_prefixes` states a model.
A line that cannot be understood is an error that names it; a trace is never silently shorter than its file.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Annotated

import msgspec

from bus.errors import BadArgument
from kvcache.hashing import ROUTING_NODE_BYTES

MOONCAKE_BLOCK_TOKENS = 512
AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")

Count = Annotated[int, msgspec.Meta(ge=0, le=2**31)]
Positive = Annotated[int, msgspec.Meta(ge=1, le=2**31)]


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a trace. chain: its prompt's nodes, of which number i covers the first `ends[i]` tokens.

    fine: a node for each token, where workers' caches are to be modelled to the token; those of `chain` are among them.
    """

    at: float
    num_tokens: int
    output_tokens: int
    chain: tuple[bytes, ...]
    ends: tuple[int, ...]
    fine: tuple[bytes, ...] = ()

    @property
    def cached(self) -> tuple[tuple[bytes, ...], Sequence[int]]:
        """What a worker's cache has of it when it is computed: nodes, and where each ends."""
        return (self.fine, range(1, len(self.fine) + 1)) if self.fine else (self.chain, self.ends)


class MooncakeLine(msgspec.Struct, frozen=True):
    timestamp: Annotated[float, msgspec.Meta(ge=0)]
    input_length: Positive
    output_length: Count
    hash_ids: list[Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]]


class RecordedLine(msgspec.Struct, frozen=True):
    timestamp: Annotated[float, msgspec.Meta(ge=0)]
    input_length: Positive
    output_length: Count
    hash_ids: list[str]
    ends: list[Positive]


def node_of(number: int) -> bytes:
    """A block that a trace knows by a number, as a node of a routing chain."""
    return number.to_bytes(ROUTING_NODE_BYTES, "big")


def block_ends(num_tokens: int, block_tokens: int) -> tuple[int, ...]:
    """Where each block of a prompt ends; the last one may be short."""
    return (*range(block_tokens, num_tokens, block_tokens), num_tokens)


def read_trace(path: Path) -> list[Arrival]:
    """All arrivals in order of time, from 0 on. The format is told by the file. Raises BadArgument."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            first = file.readline()
            lines = itertools.chain([first], file)
            arrivals = list(_read_azure(path, lines) if first.startswith(AZURE_COLUMNS[0]) else _read_json(path, lines))
    except OSError as error:
        raise BadArgument(f"the trace {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise BadArgument(f"the trace {path} is not text: {error.reason} at byte {error.start}") from None
    if not arrivals:
        raise BadArgument(f"the trace {path} has no requests")
    arrivals.sort(key=lambda arrival: arrival.at)
    return [replace(arrival, at=arrival.at - arrivals[0].at) for arrival in arrivals]


def faster(arrivals: Iterable[Arrival], speed: float) -> list[Arrival]:
    """The same requests, `speed` times as many in a second."""
    return [replace(arrival, at=arrival.at / speed) for arrival in arrivals]


def _read_json(path: Path, lines: Iterable[str]) -> Iterator[Arrival]:
    mooncake, recorded = msgspec.json.Decoder(MooncakeLine).decode, msgspec.json.Decoder(RecordedLine).decode
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield _from_recorded(recorded(line)) if '"ends"' in line else _from_mooncake(mooncake(line))
        except (msgspec.DecodeError, BadArgument) as error:
            raise BadArgument(f"{path}, line {number}: {error}") from None


def _from_mooncake(line: MooncakeLine) -> Arrival:
    ends = block_ends(line.input_length, MOONCAKE_BLOCK_TOKENS)
    if len(ends) != len(line.hash_ids):
        raise BadArgument(f"{line.input_length} tokens make {len(ends)} blocks of 512, not {len(line.hash_ids)}")
    chain = tuple(node_of(number) for number in line.hash_ids)
    return Arrival(line.timestamp / 1000, line.input_length, line.output_length, chain, ends)


def _from_recorded(line: RecordedLine) -> Arrival:
    ends = tuple(line.ends)
    if len(ends) != len(line.hash_ids) or list(ends) != sorted(ends) or (ends and ends[-1] > line.input_length):
        raise BadArgument("ends must be one for each of hash_ids, rise, and not go beyond input_length")
    try:
        chain = tuple(bytes.fromhex(node) for node in line.hash_ids)
    except ValueError:
        raise BadArgument("hash_ids of a record must be hexadecimal") from None
    if any(len(node) != ROUTING_NODE_BYTES for node in chain):
        raise BadArgument(f"hash_ids of a record must be of {ROUTING_NODE_BYTES} bytes each")
    return Arrival(line.timestamp / 1000, line.input_length, line.output_length, chain, ends)


def _read_azure(path: Path, lines: Iterable[str]) -> Iterator[Arrival]:
    """Every prompt its own: no node is shared."""
    reader = csv.DictReader(lines)
    missing = set(AZURE_COLUMNS) - set(reader.fieldnames or ())
    if missing:
        raise BadArgument(f"{path}, line 1: there is no column {', '.join(sorted(missing))}")
    for number, row in enumerate(reader):
        try:
            at = datetime.fromisoformat(row["TIMESTAMP"].strip()).timestamp()
            num_tokens, output_tokens = int(row["ContextTokens"]), int(row["GeneratedTokens"])
        except (ValueError, AttributeError, TypeError) as error:
            raise BadArgument(f"{path}, line {number + 2}: {error}") from None
        if num_tokens < 1 or output_tokens < 0:
            raise BadArgument(f"{path}, line {number + 2}: {num_tokens} tokens in and {output_tokens} out cannot be")
        ends = block_ends(num_tokens, MOONCAKE_BLOCK_TOKENS)
        yield Arrival(at, num_tokens, output_tokens, tuple(node_of(number << 24 | i) for i in range(len(ends))), ends)
