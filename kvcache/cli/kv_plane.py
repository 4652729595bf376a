"""`kvcache kv`: KV tensors in and out of the cache, as safetensors files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import track

import kvcache
from bus.errors import NotFound
from bus.limits import MAX_COPIES
from bus.stats import SequenceInfo
from kvcache.cli.kv_files import read_layers, write_layers
from kvcache.cli.options import AsJson, Layer, SeqId, Timeout, Url
from kvcache.cli.output import console, human_bytes, note, print_json, print_table

COMMANDS = ("put", "append", "get", "length", "delete", "pin", "unpin", "list_")

InFile = Annotated[
    Path,
    typer.Option("--file", help="A safetensors file with layer.N.k and layer.N.v.", show_default=False, metavar="FILE"),
]
OutFile = Annotated[
    Path, typer.Option("--file", help="The safetensors file to write.", show_default=False, metavar="FILE")
]
OneLayer = Annotated[
    int | None, typer.Option("--layer", min=0, help="This layer only; default: all.", show_default=False, metavar="N")
]

Rf = Annotated[int, typer.Option("--rf", min=1, max=MAX_COPIES, help="How many workers are to have it.", metavar="N")]


def put(
    seq_id: SeqId,
    file: InFile,
    layer: OneLayer = None,
    rf: Rf = 1,
    url: Url = None,
    timeout: Timeout = 60.0,
    as_json: AsJson = False,
) -> None:
    """Store the layers of a file, replacing older ones."""
    layers = read_layers(file, layer)
    lengths: dict[int, int] = {}
    with kvcache.Client(url, timeout=timeout) as client:
        for index in _track(list(layers), "storing"):
            lengths[index] = client.kv.put(seq_id, index, *layers[index], rf=rf).length
    _report(lengths, as_json)


def append(
    seq_id: SeqId,
    file: InFile,
    layer: OneLayer = None,
    at: Annotated[
        int | None,
        typer.Option(
            "--at", min=0, help="Only if the layer holds exactly this many tokens.", show_default=False, metavar="N"
        ),
    ] = None,
    rf: Rf = 1,
    url: Url = None,
    timeout: Timeout = 60.0,
    as_json: AsJson = False,
) -> None:
    """Add the tokens of a file to the end of the layers."""
    layers = read_layers(file, layer)
    lengths: dict[int, int] = {}
    with kvcache.Client(url, timeout=timeout) as client:
        for index in _track(list(layers), "appending"):
            lengths[index] = client.kv.append(seq_id, index, *layers[index], at=at, rf=rf).length
    _report(lengths, as_json)


def get(
    seq_id: SeqId,
    file: OutFile,
    layer: OneLayer = None,
    start: Annotated[int, typer.Option("--start", min=0, help="The first token to read.", metavar="N")] = 0,
    stop: Annotated[
        int | None, typer.Option("--stop", min=0, help="The token to stop before.", show_default="the end", metavar="N")
    ] = None,
    url: Url = None,
    timeout: Timeout = 60.0,
    as_json: AsJson = False,
) -> None:
    """Write a sequence's KV to a file, bit for bit.

    That is what was put, or what a model computed for generate --seq-id.
    """
    with kvcache.Client(url, timeout=timeout) as client:
        wanted = [layer] if layer is not None else [it.layer for it in _find(client, seq_id).layers]
        pairs = {index: client.kv.get(seq_id, index, start, stop) for index in _track(wanted, "reading")}
    write_layers(file, pairs)
    _report({index: pair.k.shape[0] for index, pair in pairs.items()}, as_json)


def length(seq_id: SeqId, layer: Layer = 0, url: Url = None, timeout: Timeout = 10.0) -> None:
    """Print how many tokens a layer holds."""
    with kvcache.Client(url, timeout=timeout) as client:
        typer.echo(client.kv.length(seq_id, layer))


def delete(seq_id: SeqId, layer: OneLayer = None, url: Url = None, timeout: Timeout = 10.0) -> None:
    """Forget a sequence, or one layer of it."""
    with kvcache.Client(url, timeout=timeout) as client:
        count = client.kv.delete(seq_id, layer)
    note(f"deleted {count} {'layer' if count == 1 else 'layers'}")


def pin(
    seq_id: SeqId,
    ttl: Annotated[
        float | None,
        typer.Option("--ttl", min=0.001, help="For so many seconds; default: until unpinned.", metavar="S"),
    ] = None,
    url: Url = None,
    timeout: Timeout = 10.0,
) -> None:
    """Keep a sequence from eviction."""
    with kvcache.Client(url, timeout=timeout) as client:
        client.kv.pin(seq_id, ttl)
    note(f"pinned for {ttl:g} s" if ttl is not None else "pinned")


def unpin(seq_id: SeqId, url: Url = None, timeout: Timeout = 10.0) -> None:
    """Let a sequence be evicted again."""
    with kvcache.Client(url, timeout=timeout) as client:
        client.kv.unpin(seq_id)
    note("unpinned")


def list_(
    prefix: Annotated[
        str, typer.Argument(help="Only ids that begin with this.", show_default=False, metavar="PREFIX")
    ] = "",
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="At most this many.", show_default=False, metavar="N")
    ] = None,
    url: Url = None,
    timeout: Timeout = 10.0,
    as_json: AsJson = False,
) -> None:
    """List the sequences that the workers hold."""
    with kvcache.Client(url, timeout=timeout) as client:
        sequences = client.kv.list(prefix, limit)
    if as_json:
        print_json(sequences)
        return
    rows = [
        (it.seq_id, it.kind, len(it.layers), _num_tokens(it), human_bytes(it.nbytes), "pinned" if it.pinned else "")
        for it in sequences
    ]
    print_table(["SEQUENCE", "KIND", "#LAYERS", "#TOKENS", "#SIZE", ""], rows)


def _find(client: kvcache.Client, seq_id: str) -> SequenceInfo:
    for info in client.kv.list(seq_id):
        if info.seq_id == seq_id:
            return info
    raise NotFound(f"no worker holds a sequence {seq_id!r}")


def _num_tokens(info: SequenceInfo) -> int:
    return info.num_tokens or max((layer.length for layer in info.layers), default=0)


def _track(layers: list[int], doing: str) -> Iterable[int]:
    """The layers, with a progress bar on stderr while they are gone through, when there are many."""
    terminal = console(stderr=True)
    is_hidden = len(layers) < 4 or not terminal.is_terminal
    return track(layers, description=doing, console=terminal, transient=True, disable=is_hidden)


def _report(lengths: dict[int, int], as_json: bool) -> None:
    if as_json:
        print_json({"layers": [{"layer": layer, "length": length} for layer, length in sorted(lengths.items())]})
        return
    tokens = sorted(set(lengths.values()))
    each = f"{tokens[0]}" if len(tokens) == 1 else f"{tokens[0]} to {tokens[-1]}"
    note(f"{len(lengths)} {'layer' if len(lengths) == 1 else 'layers'} of {each} tokens")
