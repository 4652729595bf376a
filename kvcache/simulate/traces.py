"""Traces: requests with their times, lengths and prefixes, from files of several formats.

Mooncake JSONL: one object a line with `timestamp` (ms), `input_length`, `output_length` and `hash_ids`, chained ids
of 512-token blocks (Qin et al., FAST '25); what it has no ids for is taken to be nobody else's. Recorded JSONL: what
`kvcache record` wrote. CSV of Azure (2023, 2024) or BurstGPT: times and lengths and no prefixes, for which
`synthetic.with_prefixes` states a model.
A file is read line by line; a line that cannot be understood is an error that names it; a trace is never silently
shorter than its file.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from math import inf
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec

from bus.errors import BadArgument
from kvcache.hashing import ROUTING_NODE_BYTES

MOONCAKE_BLOCK_TOKENS = 512
MAX_TOKENS = 2**24
"""Of one prompt. Far beyond any model's, and no line of a few bytes makes more than 32,768 nodes."""
MAX_LINE = 2**22
"""Characters: a line of that prompt's ids has fewer."""
MAX_REQUESTS = 2_000_000
"""That are kept in memory, at 1 to 20 KB each. There are public traces of 20 times as many."""

Count = Annotated[int, msgspec.Meta(ge=0, le=MAX_TOKENS)]
Positive = Annotated[int, msgspec.Meta(ge=1, le=MAX_TOKENS)]


class Columns(NamedTuple):
    """What a kind of CSV calls them; seconds: a time's text as seconds."""

    time: str
    tokens_in: str
    tokens_out: str
    seconds: Callable[[str], float]


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


class Trace(list[Arrival]):
    """Arrivals from a file, and whether its format says what prompts share."""

    def __init__(self, arrivals: Iterable[Arrival], tells_prefixes: bool) -> None:
        super().__init__(arrivals)
        self.tells_prefixes = tells_prefixes


def read_trace(path: Path, until_s: float = inf) -> Trace:
    """All arrivals of the first `until_s` seconds in order of time, from 0 on. The format is told by the file.

    Lines may be in any order. Raises BadArgument.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = _bounded(path, iter(lambda: file.readline(MAX_LINE + 1), ""))
            first = next(lines, "")
            columns = _columns(first)
            lines = itertools.chain([first], lines)
            read = _read_csv(path, lines, columns) if columns is not None else _read_json(path, lines)
            arrivals = _earliest(path, read, until_s)
    except OSError as error:
        raise BadArgument(f"the trace {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise BadArgument(f"the trace {path} is not text: {error.reason} at byte {error.start}") from None
    if not arrivals:
        raise BadArgument(f"the trace {path} has no requests")
    arrivals.sort(key=lambda arrival: arrival.at)
    start = arrivals[0].at
    first_s = (replace(arrival, at=arrival.at - start) for arrival in arrivals if arrival.at - start <= until_s)
    return Trace(first_s, tells_prefixes=columns is None)


def faster(arrivals: Iterable[Arrival], speed: float) -> list[Arrival]:
    """The same requests, `speed` times as many in a second."""
    return [replace(arrival, at=arrival.at / speed) for arrival in arrivals]


def _bounded(path: Path, lines: Iterator[str]) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if len(line) > MAX_LINE:
            raise BadArgument(
                f"{path}, line {number}: it has more than {MAX_LINE} characters; one request a line, please"
            )
        yield line


def _earliest(path: Path, arrivals: Iterable[Arrival], until_s: float) -> list[Arrival]:
    """Those that may be of the first `until_s` seconds, as far as those before them tell when it begins."""
    kept: list[Arrival] = []
    begins = inf
    for arrival in arrivals:
        begins = min(begins, arrival.at)
        if arrival.at <= begins + until_s:
            kept.append(arrival)
        if len(kept) > MAX_REQUESTS:
            raise BadArgument(
                f"the trace {path} has more than {MAX_REQUESTS:,} requests; --until S takes its beginning"
            )
    return kept


def _read_json(path: Path, lines: Iterable[str]) -> Iterator[Arrival]:
    mooncake, recorded = msgspec.json.Decoder(MooncakeLine).decode, msgspec.json.Decoder(RecordedLine).decode
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            if '"ends"' in line:
                yield _from_recorded(recorded(line), number)
            else:
                yield _from_mooncake(mooncake(line), number)
        except (msgspec.DecodeError, RecursionError, BadArgument) as error:
            raise BadArgument(f"{path}, line {number}: {error}") from None


def _from_mooncake(line: MooncakeLine, number: int) -> Arrival:
    ends = block_ends(line.input_length, MOONCAKE_BLOCK_TOKENS)
    if len(ends) < len(line.hash_ids):
        raise BadArgument(f"{line.input_length} tokens make {len(ends)} blocks of 512, not {len(line.hash_ids)}")
    chain = (*map(node_of, line.hash_ids), *_own(number, len(ends))[len(line.hash_ids) :])
    return Arrival(line.timestamp / 1000, line.input_length, line.output_length, chain, ends)


def _own(number: int, num_nodes: int) -> tuple[bytes, ...]:
    """Nodes of the request in this line, and of nobody else: no trace's number has the first bit."""
    return tuple(node_of(1 << 63 | number << 16 | index) for index in range(num_nodes))


def _from_recorded(line: RecordedLine, number: int) -> Arrival:
    ends = tuple(line.ends)
    if len(ends) != len(line.hash_ids) or list(ends) != sorted(ends) or (ends and ends[-1] > line.input_length):
        raise BadArgument("ends must be one for each of hash_ids, rise, and not go beyond input_length")
    try:
        chain = tuple(bytes.fromhex(node) for node in line.hash_ids)
    except ValueError:
        raise BadArgument("hash_ids of a record must be hexadecimal") from None
    if any(len(node) != ROUTING_NODE_BYTES for node in chain):
        raise BadArgument(f"hash_ids of a record must be of {ROUTING_NODE_BYTES} bytes each")
    if not chain:  # its client sent none
        chain, ends = _own(number, 1), (line.input_length,)
    return Arrival(line.timestamp / 1000, line.input_length, line.output_length, chain, ends)


def _read_csv(path: Path, lines: Iterable[str], columns: Columns) -> Iterator[Arrival]:
    """Every prompt its own: no node is shared. One of no tokens has one, with which every prompt begins."""
    reader = csv.DictReader(lines)
    try:
        missing = set(columns[:3]) - set(reader.fieldnames or ())
        if missing:
            raise ValueError(f"there is no column {', '.join(sorted(missing))}")
        for row in reader:
            at = columns.seconds(row[columns.time].strip())
            num_tokens, output_tokens = (_tokens(row[name]) for name in columns[1:3])
            if not 0 <= at < inf:
                raise ValueError(f"{at} is no time")
            ends = block_ends(max(1, num_tokens), MOONCAKE_BLOCK_TOKENS)
            yield Arrival(at, ends[-1], output_tokens, _own(reader.line_num, len(ends)), ends)
    except (ValueError, AttributeError, TypeError, OverflowError, csv.Error) as error:
        raise BadArgument(f"{path}, line {reader.line_num}: {error}") from None


def _columns(header: str) -> Columns | None:
    """What kind of CSV has this first line; None if it is none."""
    names = {name.strip(' "\r\n') for name in header.split(",")}
    return next((columns for columns in (AZURE, BURST_GPT) if columns.time in names), None)


def _tokens(text: str) -> int:
    """A count, which may be written as a float."""
    number = float(text)
    if not number.is_integer() or not 0 <= number <= MAX_TOKENS:
        raise ValueError(f"{text} is no number of tokens from 0 to {MAX_TOKENS}")
    return int(number)


def _moment(text: str) -> float:
    """Without a zone it is UTC, so that no summer begins in the middle."""
    moment = datetime.fromisoformat(text)
    return (moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)).timestamp()


AZURE = Columns("TIMESTAMP", "ContextTokens", "GeneratedTokens", _moment)
BURST_GPT = Columns("Timestamp", "Request tokens", "Response tokens", float)
