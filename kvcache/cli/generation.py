"""`kvcache generate` and `kvcache chat`: text on stdout as it is made, what it cost on stderr."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Iterator, Sequence
from typing import Annotated

import typer

import kvcache
from kvcache.cli.cluster import explained
from kvcache.cli.options import AsJson, Policy, Timeout, Url
from kvcache.cli.output import human_seconds, note, print_json, print_table, say
from kvcache.cli.sampling_options import (
    FrequencyPenalty,
    IgnoreEos,
    LogitBias,
    Logprobs,
    MaxTokens,
    MinP,
    MinTokens,
    NumOutputs,
    PresencePenalty,
    RepetitionPenalty,
    Seed,
    Stop,
    StopTokenIds,
    Temperature,
    TopK,
    TopP,
    parse_logit_bias,
)

Prompt = Annotated[str, typer.Argument(help="The prompt; - reads it from stdin.", show_default=False, metavar="PROMPT")]
Model = Annotated[
    str | None,
    typer.Option("--model", help="A model's name; default: the worker's.", show_default=False, metavar="NAME"),
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
Priority = Annotated[
    int,
    typer.Option("--priority", min=-100, max=100, help="Of those that wait the lower are sooner.", metavar="N"),
]


def generate(
    prompt: Prompt,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    presence_penalty: PresencePenalty = 0.0,
    frequency_penalty: FrequencyPenalty = 0.0,
    logit_bias: LogitBias = None,
    seed: Seed = None,
    stop: Stop = None,
    stop_token_ids: StopTokenIds = None,
    min_tokens: MinTokens = 0,
    ignore_eos: IgnoreEos = False,
    n: NumOutputs = 1,
    logprobs: Logprobs = None,
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
    priority: Priority = 0,
    explain: Annotated[bool, typer.Option("--explain", help="Say why this worker, before the text.")] = False,
    pull_from: Annotated[
        str | None,
        typer.Option(
            "--pull-from",
            help="Copy what this worker holds of the prompt to the one that serves it.",
            show_default=False,
            metavar="WORKER",
        ),
    ] = None,
    url: Url = None,
    timeout: Timeout = 120.0,
    as_json: AsJson = False,
) -> None:
    """Generate from a prompt and stream the text."""
    params = kvcache.SamplingParams(
        n=n,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        logit_bias=parse_logit_bias(logit_bias or ()),
        seed=seed,
        stop=tuple(stop or ()),
        stop_token_ids=tuple(stop_token_ids or ()),
        ignore_eos=ignore_eos,
        logprobs=logprobs,
    )
    if prompt == "-":
        prompt = sys.stdin.read()
    with (
        kvcache.Client(url, timeout=timeout) as client,
        client.generate(
            prompt,
            params,
            seq_id=seq_id,
            cache_salt=cache_salt,
            model=model,
            policy=policy,
            priority=priority,
            explain=explain,
            pull_from=pull_from,
        ) as generation,
    ):
        if as_json:
            outputs = [_plain(done) for done in generation.results()]
            print_json(outputs if n > 1 else outputs[0])
            return
        for done in _show_all(generation) if n > 1 else [_show(generation)]:
            note(_summary(done))
            if logprobs is not None:
                print_table(*_logprob_table(done.tokens), to_stderr=True)


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


def _show_all(generation: kvcache.Generation) -> Iterator[kvcache.Done]:
    """Write the texts one after the other, each once all are complete; yields how each ended."""
    for done in generation.results():
        say(f"{done.text}\n")
        yield done


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
        **({"tokens": done.tokens} if done.tokens else {}),
    }


def _logprob_table(tokens: Sequence[kvcache.Token]) -> tuple[list[str], list[list[object]]]:
    """Each token with the logarithm of its probability, and the likeliest at its place."""
    rows: list[list[object]] = [
        [
            token.token_id,
            repr(token.text),
            f"{token.logprob:.3f}",
            " ".join(f"{other.token_id}:{other.logprob:.3f}" for other in token.top_logprobs),
        ]
        for token in tokens
    ]
    return ["#TOKEN", "TEXT", "#LOGPROB", "LIKELIEST"], rows
