"""`python -m kvcache.demo`: a streamed two-turn chat on a broker, two workers and a real model, with the figures.

The second turn repeats the first one's prompt and answer, as every chat does; the figures show that
their keys and values were read from the cache. Before the chat each worker answers one unrelated
prompt, so that a cold process is not mistaken for a cold cache.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TypedDict

from rich.console import Console
from rich.table import Table

from bus.errors import KVCacheError
from kvcache.client import Client
from kvcache.client.results import Token
from kvcache.local import cluster

SYSTEM = (
    "You are a patient guide in a museum of science. You explain one idea at a time, in plain words and short"
    " sentences, with one example from daily life for each idea. You never use a technical term before you have said"
    " what it means. You do not make up facts; when you are not sure you say so. You never answer with a list. When"
    " the visitor asks a second question, you connect your answer to what you said before. This is what stands in the"
    " room. First hall, light: a prism of glass on a stand, with a lamp behind it and a white wall before it, where the"
    " visitor sees the colours side by side; a tank of water with a drop of milk in it, which looks blue from the side"
    " and orange from the end; two pairs of glasses that turn dark when they are crossed; and a bowl of soap water with"
    " wire rings to make films from. Second hall, air: a glass bell with a pump and a ringing clock in it, a balloon on"
    " a scale, a long tube in which a feather and a coin fall side by side, and a barometer that a visitor can carry up"
    " the stairs of the tower. Third hall, heat: three bowls of water, cold, warm and hot; a bar of copper and a bar of"
    " wood that feel different to the hand although they are equally cold; and a window through which one sees the"
    " warmth of one's own face on a screen. The cafeteria is on the ground floor and closes at five in the afternoon."
)
QUESTIONS = ("Why is the sky blue?", "And why is it red in the evening?")
MAX_TOKENS = 64


class Turn(TypedDict):
    worker: str
    reason: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    ttft_s: float
    tokens_per_s: float
    text: str


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo. Returns 0, 1 with the reason on stderr, or 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m kvcache.demo", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="end with one line of JSON; all else goes to stderr")
    parser.add_argument("--model", default="smollm2", help="a name, folder or hub id [smollm2]")
    given = parser.parse_args(argv)
    console = Console(stderr=given.json, highlight=False)
    try:
        console.print("starting a broker and two workers, loading the model ...")
        with cluster(2, model=given.model) as url:
            turns = _chat(url, console)
    except (KVCacheError, RuntimeError) as error:
        sys.stderr.write(f"demo: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("demo: interrupted\n")
        return 130
    _show(turns, console)
    if given.json:
        sys.stdout.write(json.dumps({"turns": turns}) + "\n")
    return 0


def _chat(url: str, console: Console) -> list[Turn]:
    turns: list[Turn] = []
    messages = [{"role": "system", "content": SYSTEM}]
    with Client(url) as client:
        _warm_up(client)
        for question in QUESTIONS:
            messages.append({"role": "user", "content": question})
            turns.append(_turn(client, messages, console))
            messages.append({"role": "assistant", "content": turns[-1]["text"]})
    return turns


def _warm_up(client: Client) -> None:
    for view in client.workers():
        ids = (f"warm-up-{number}" for number in range(1000))
        seq_id = next(name for name in ids if client.route(name).worker_id == view.worker_id)
        client.generate("One, two,", max_tokens=4, temperature=0.0, seq_id=seq_id, cache_salt="warm-up").text()


def _turn(client: Client, messages: Sequence[dict[str, str]], console: Console) -> Turn:
    console.print(f"\n[bold]you[/bold]  {messages[-1]['content']}\n[bold]model[/bold]  ", end="")
    generation = client.generate(messages=messages, max_tokens=MAX_TOKENS, temperature=0.0, seq_id="demo")
    for event in generation:
        if isinstance(event, Token):
            console.print(event.text, end="", markup=False, soft_wrap=True)
    console.print()
    done = generation.result()
    return Turn(
        worker=done.worker_id,
        reason=done.reason,
        prompt_tokens=done.usage.prompt_tokens,
        cached_tokens=done.usage.cached_tokens,
        completion_tokens=done.usage.completion_tokens,
        ttft_s=round(done.timings.ttft_s, 4),
        tokens_per_s=round(done.timings.tokens_per_s, 1),
        text=done.text,
    )


def _show(turns: Sequence[Turn], console: Console) -> None:
    table = Table(title="\nwhat the cache did", title_justify="left")
    for column in ("turn", "worker", "prompt", "cached", "first token", "tokens/s"):
        table.add_column(column, justify="left" if column == "worker" else "right")
    for number, turn in enumerate(turns, 1):
        table.add_row(
            str(number),
            turn["worker"],
            str(turn["prompt_tokens"]),
            str(turn["cached_tokens"]),
            f"{turn['ttft_s'] * 1000:.0f} ms",
            f"{turn['tokens_per_s']:.0f}",
        )
    console.print(table)
    console.print(f"why {turns[-1]['worker']}: {turns[-1]['reason']}")


if __name__ == "__main__":
    raise SystemExit(main())
