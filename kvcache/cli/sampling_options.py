"""Options that say how tokens are drawn. Their ranges are not here: `SamplingParams` checks them for everybody."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from bus.errors import BadArgument

MaxTokens = Annotated[int, typer.Option("--max-tokens", help="Stop after this many tokens.", metavar="N")]
MinTokens = Annotated[int, typer.Option("--min-tokens", help="Let nothing end it before this many.", metavar="N")]
Temperature = Annotated[float, typer.Option("--temperature", help="0 always takes the likeliest token.", metavar="T")]
TopP = Annotated[
    float, typer.Option("--top-p", help="Draw from the likeliest tokens that hold this much probability.", metavar="P")
]
TopK = Annotated[int, typer.Option("--top-k", help="Draw from this many likeliest tokens; 0: from all.", metavar="K")]
MinP = Annotated[
    float, typer.Option("--min-p", help="Draw from tokens this probable beside the likeliest.", metavar="P")
]
RepetitionPenalty = Annotated[
    float,
    typer.Option("--repetition-penalty", help="Above 1 avoids tokens of prompt and output.", metavar="X"),
]
PresencePenalty = Annotated[
    float, typer.Option("--presence-penalty", help="Taken from the logits of tokens in the output.", metavar="X")
]
FrequencyPenalty = Annotated[
    float, typer.Option("--frequency-penalty", help="The same, as often as they are in it.", metavar="X")
]
LogitBias = Annotated[
    list[str] | None,
    typer.Option(
        "--logit-bias", help="Add to a token's logit; may be repeated.", show_default=False, metavar="TOKEN_ID=X"
    ),
]
Seed = Annotated[
    int | None, typer.Option("--seed", help="The same seed draws the same tokens.", show_default=False, metavar="N")
]
Stop = Annotated[
    list[str] | None,
    typer.Option("--stop", help="End before this text; may be repeated.", show_default=False, metavar="TEXT"),
]
StopTokenIds = Annotated[
    list[int] | None,
    typer.Option(
        "--stop-token-id", help="End with this token; may be repeated.", show_default=False, metavar="TOKEN_ID"
    ),
]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="Go on when the model says that it is done.")]
NumOutputs = Annotated[int, typer.Option("--n", help="Draw this many outputs.", metavar="N")]
Logprobs = Annotated[
    int | None,
    typer.Option(
        "--logprobs",
        help="Tell how probable each token was, and this many likeliest ones.",
        show_default=False,
        metavar="N",
    ),
]


def parse_logit_bias(pairs: Sequence[str]) -> dict[int, float]:
    """`TOKEN_ID=X`, each. Raises BadArgument."""
    biases: dict[int, float] = {}
    for pair in pairs:
        token_id, _, bias = pair.partition("=")
        try:
            biases[int(token_id)] = float(bias)
        except ValueError:
            raise BadArgument(f"--logit-bias must be TOKEN_ID=X, such as 42=-1.5, not {pair!r:.60}") from None
    return biases
