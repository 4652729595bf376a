"""Questions about tokens and text, which any worker with the model answers: nothing is computed, cached or changed.

They go to the engine with a ticket, because it knows the models; its text thread answers them beside the steps. Core.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bus import stats, wire
from bus.errors import InternalError, KVCacheError, TooLarge
from bus.limits import MAX_PROMPT_BYTES, MAX_SPELLED_TOKENS
from bus.messages import Detokenize, Detokenized, Tokenize, Tokenized
from bus.wire import Buffer
from kvcache.hashing import encode_token_ids
from workers.calls import Action, Call, CallId, Calls, Tell
from workers.engine_api import Answered, EncodePrompt, Encoding, SpellTokens, Ticket


class Spelling:
    """The calls that wait for a tokenizer."""

    def __init__(self, calls: Calls, next_ticket: Callable[[], Ticket]) -> None:
        self._calls = calls
        self._next_ticket = next_ticket
        self._asking: dict[Ticket, Call] = {}
        self._tickets: dict[CallId, Ticket] = {}

    def __contains__(self, ticket: Ticket) -> bool:
        """Whether a call waits for the answer with this ticket."""
        return ticket in self._asking

    def start(self, call: Call, message: Tokenize | Detokenize, payload: Sequence[Buffer]) -> list[Action]:
        """Ask the engine. Raises TooLarge."""
        data = bytes(payload[0])
        if len(data) > MAX_PROMPT_BYTES:
            raise TooLarge(f"the payload has {len(data)} bytes; the limit is {MAX_PROMPT_BYTES}")
        ticket = self._next_ticket()
        self._asking[ticket] = call
        self._tickets[call.id] = ticket
        if isinstance(message, Tokenize):
            question = EncodePrompt(
                ticket=ticket, model=message.model, kind=message.kind, prompt=data, special=message.special
            )
            return [Tell(question)]
        return [Tell(SpellTokens(ticket=ticket, model=message.model, tokens=data, each=message.each))]

    def stop(self, call: Call) -> list[Action]:
        """Nobody waits for it any more."""
        ticket = self._tickets.pop(call.id, None)
        if ticket is not None:
            del self._asking[ticket]
        return []

    def answered(self, event: Answered) -> list[Action]:
        call = self._asking.pop(event.ticket)
        del self._tickets[call.id]
        match event.answer:
            case KVCacheError() as error:
                return self._calls.fail(call, error)
            case Encoding() as encoding:
                return self._tokenized(call, encoding)
            case stats.Spelling() as spelling:
                return self._detokenized(call, spelling)
            case _:
                return self._calls.fail(call, InternalError("the engine answered another question"))

    def _tokenized(self, call: Call, encoding: Encoding) -> list[Action]:
        if len(encoding.tokens) > MAX_SPELLED_TOKENS:
            error = TooLarge(f"the prompt has {len(encoding.tokens)} tokens; at most {MAX_SPELLED_TOKENS} are told")
            return self._calls.fail(call, error)
        payload = encode_token_ids(encoding.tokens)
        message = Tokenized(
            req_id=call.request.req_id,
            model=encoding.model,
            max_model_len=encoding.max_model_len,
            payload=wire.describe([payload]),
        )
        return self._calls.finish(call, message, payload)

    def _detokenized(self, call: Call, spelling: stats.Spelling) -> list[Action]:
        payload = stats.pack(spelling)
        if len(payload) > MAX_PROMPT_BYTES:
            error = TooLarge(f"the tokens' text has {len(payload)} bytes; at most {MAX_PROMPT_BYTES} are told")
            return self._calls.fail(call, error)
        answer = Detokenized(req_id=call.request.req_id, payload=wire.describe([payload]))
        return self._calls.finish(call, answer, payload)
