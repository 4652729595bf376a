"""`kvcache generate` and `kvcache chat`: text on stdout as it is made, what it cost on stderr."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Iterator
from typing import Annotated

import typer

import kvcache
from kvcache.cli.cluster import explained
from kvcache.cli.options import AsJson, Policy, Timeout, Url
from kvcache.cli.output import human_seconds, note, print_json, print_table, say

Prompt = Annotated[str, typer.Argument(help="The prompt; - reads it from stdin.", show_default=False, metavar="PROMPT")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1, help="Stop after this many tokens.", metavar="N")]
Temperature = Annotated[
    float, typer.Option("--temperature", min=0.0, help="0 always takes the likeliest token.", metavar="T")
]
TopP = Annotated[
    float, typer.Option("--top-p", help="Draw from the likeliest tokens that hold this much probability.", metavar="P")
]
TopK = Annotated[
    int, typer.Option("--top-k", min=0, help="Draw from this many likeliest tokens; 0: from all.", metavar="K")
]
Seed = Annotated[
    int | None, typer.Option("--seed", help="The same seed draws the same tokens.", show_default=False, metavar="N")
]
Stop = Annotated[
    list[str] | None,
    typer.Option("--stop", help="End before this text; may be repeated.", show_default=False, metavar="TEXT"),
]
Model = Annotated[
    str | None,
    typer.Option("--model", help="A model's name; default: the worker's first.", show_default=False, metavar="NAME"),
]
CacheSalt = Annotated[
    str | None,
    typer.Option(
        "--cache-salt",
        help="Share cached prefixes only with requests of the same salt.",
        show_default=False,
        metavar="SALT",
    ),
]


def generate(
    prompt: Prompt,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    stop: Stop = None,
    seq_id: Annotated[
        str | None,
        typer.Option(
            "--seq-id",
            help="Keep the KV under this id, and go on from what it holds.",
            show_default=False,
            metavar="ID",
        ),
    ] = None,
    cache_salt: CacheSalt = None,
    model: Model = None,
    policy: Policy = None,
    explain: Annotated[bool, typer.Option("--explain", help="Say why this worker, before the text.")] = False,
    url: Url = None,
    timeout: Timeout = 120.0,
    as_json: AsJson = False,
) -> None:
    """Generate from a prompt and stream the text."""
    if prompt == "-":
        prompt = sys.stdin.read()
    with (
        kvcache.Client(url, timeout=timeout) as client,
        client.generate(
            prompt,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            stop=tuple(stop or ()),
            seq_id=seq_id,
            cache_salt=cache_salt,
            model=model,
            policy=policy,
            explain=explain,
        ) as generation,
    ):
        if as_json:
            print_json(_plain(generation.result()))
            return
        done = _show(generation)
    note(_summary(done))


def chat(
    system: Annotated[
        str | None, typer.Option("--system", help="A system message to begin with.", show_default=False, metavar="TEXT")
    ] = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.95,
    seed: Seed = None,
    cache_salt: CacheSalt = None,
    model: Model = None,
    url: Url = None,
    timeout: Timeout = 120.0,
) -> None:
    """Hold a conversation, reusing KV from turn to turn.

    Ctrl-C stops an answer, Ctrl-D ends the chat. /reset forgets the conversation, /exit ends it.
    """
    opening = [{"role": "system", "content": system}] if system else []
    messages, seq_id = list(opening), _new_seq_id()
    with kvcache.Client(url, timeout=timeout) as client:
        for text in _turns():
            if text == "/reset":
                client.kv.delete(seq_id)
                messages, seq_id = list(opening), _new_seq_id()
                continue
            messages.append({"role": "user", "content": text})
            with client.generate(
                messages=messages,
                max_tokens=max_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                seq_id=seq_id,
                cache_salt=cache_salt,
                model=model,
            ) as generation:
                try:
                    done = _show(generation)
                except KeyboardInterrupt:
                    messages.pop()
                    note("\nstopped; the turn is forgotten")
                    continue
            note(_summary(done))
            messages.append({"role": "assistant", "content": done.text})


def _show(generation: kvcache.Generation) -> kvcache.Done:
    """Write the text as it comes; returns how it ended."""
    for event in generation:
        match event:
            case kvcache.Start() if event.explanation is not None:
                print_table(*explained(event.explanation), to_stderr=True)
            case kvcache.Token():
                say(event.text)
    say("\n")
    return generation.result()


def _turns() -> Iterator[str]:
    """What the user says, turn by turn, until the end of input or /exit."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        import readline  # noqa: F401 - importing it is what gives input() editing and history
    while True:
        try:
            text = input("> " if is_terminal else "").strip()
        except EOFError:
            return
        if text == "/exit":
            return
        if text:
            yield text


def _new_seq_id() -> str:
    return f"chat-{secrets.token_hex(8)}"


def _summary(done: kvcache.Done) -> str:
    usage, timings = done.usage, done.timings
    moved = f", moved {timings.resumes}x" if timings.resumes else ""
    return (
        f"[{done.worker_id}: {done.reason}; prompt {usage.prompt_tokens} tokens, {usage.cached_tokens} cached;"
        f" {usage.completion_tokens} generated, {done.finish_reason};"
        f" first after {human_seconds(timings.ttft_s)}, {timings.tokens_per_s:.1f} tokens/s{moved}]"
    )


def _plain(done: kvcache.Done) -> dict[str, object]:
    return {
        "text": done.text,
        "finish_reason": done.finish_reason,
        "worker_id": done.worker_id,
        "reason": done.reason,
        "request_id": done.request_id,
        "usage": done.usage,
        "timings": done.timings,
    }
