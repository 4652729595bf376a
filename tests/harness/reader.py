"""A client in a process of its own, to be frozen or killed: reads one greedy generation and writes it as it comes.

    python -m tests.harness.reader URL NUM_TOKENS PROMPT_SEED

One line with the number of tokens so far for each batch, then one line with all of them, as JSON lists.
"""

from __future__ import annotations

import json
import sys

from kvcache import Client, Token
from tests.harness.prompts import token_prompt


def main(url: str, num_tokens: int, seed: int) -> None:
    tokens: list[int] = []
    with (
        Client(url, timeout=60.0) as client,
        client.generate(
            token_ids=token_prompt(seed, 40), max_tokens=num_tokens, temperature=0.0, ignore_eos=True
        ) as generation,
    ):
        for event in generation:
            if isinstance(event, Token):
                tokens.append(event.token_id)
                _say([len(tokens)])
    _say(tokens)


def _say(numbers: list[int]) -> None:
    sys.stdout.write(json.dumps(numbers) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
