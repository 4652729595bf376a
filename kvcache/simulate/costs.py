"""What a modelled worker's work costs, in seconds: prefill, decode, pulls from peers."""

from __future__ import annotations

from math import inf
from pathlib import Path

import msgspec

from bus.errors import BadArgument
from kvcache.routing.views import Rates


class Costs(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One worker's true speed, which routing must learn.

    token_s, context_s, decode_s: of a prefill, as in `kvcache.routing.views.Rates`. step_s: between two tokens of a
    sequence that decodes. pull_s: to move one token's KV between two workers; None: they cannot.
    pull_start_s: before its first byte arrives. crowding: by which share everything takes longer for each other worker
    that is busy, as on one machine, where they share memory and processors.
    The defaults are of a 70B model on a node of 8 GPUs: 8,000 tokens a second of prefill at the beginning of a prompt
    and half of that at token 114,000, 30 ms a step, 320 KiB of KV a token over a 100 Gbit/s link.
    """

    token_s: float = 1 / 8000
    context_s: float = 1.1e-9
    decode_s: float = 0.0
    step_s: float = 0.03
    pull_s: float | None = 1 / 40_000
    pull_start_s: float = 0.005
    crowding: float = 0.0

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if value is not None and not 0.0 <= value < inf:
                raise BadArgument(f"{name} must be a number of seconds, 0 or more, not {value}")
        if self.token_s == 0.0:
            raise BadArgument("token_s must be above 0: no prefill is free")

    @property
    def rates(self) -> Rates:
        return Rates(token_s=self.token_s, context_s=self.context_s, decode_s=self.decode_s)


def read_costs(path: Path) -> Costs:
    """Costs from a JSON file, as `--calibrate` writes it. Raises BadArgument that says what is wrong with it."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Costs)
    except OSError as error:
        raise BadArgument(f"the costs in {path} cannot be read: {error.strerror}") from None
    except msgspec.DecodeError as error:
        raise BadArgument(f"{path} is no file of costs: {error}") from None
