"""Tokens to text, beside the steps: the engine's events as the loop hears them.

    engine's thread --EngineEvent--> Texts --Event--> loop
          ^                            |
          '------- Finish, Fail -------'

The engine only hands out ids. Here they become text, in the order in which they came, and here a stop string is found.
By then the engine may be a step further: tokens behind the end are dropped, and the engine is told with how many the
output ends, so that what is kept of it does not depend on who was faster.

    RUNNING   its tokens become text
    STOPPED   a stop string was complete: nothing follows but its end
    BROKEN    its tokens cannot be decoded; its client has heard so, and hears nothing more
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from bus.errors import InternalError, KVCacheError
from bus.messages import FinishReason
from workers.engine_api import (
    Broke,
    Ended,
    EngineEvent,
    Event,
    Fail,
    Finish,
    NewToken,
    Opened,
    Produced,
    RunId,
    TextCommand,
)
from workers.text import TextStream

log = logging.getLogger(__name__)


class _State(enum.Enum):
    RUNNING = enum.auto()
    STOPPED = enum.auto()
    BROKEN = enum.auto()


@dataclass(slots=True)
class _Output:
    text: TextStream
    num_tokens: int
    state: _State = _State.RUNNING


class Texts:
    """The text of every generation that was opened and has not ended."""

    def __init__(self) -> None:
        self._outputs: dict[RunId, _Output] = {}

    def translate(self, events: Sequence[EngineEvent]) -> tuple[list[Event], list[TextCommand]]:
        """What the loop is to hear, and what the engine."""
        out: list[Event] = []
        commands: list[TextCommand] = []
        for event in events:
            match event:
                case Opened():
                    self._outputs[event.run] = _Output(event.text, len(event.resume))
                    self._guard(event, out, commands)
                case NewToken():
                    if self._outputs[event.run].state is _State.RUNNING:
                        self._guard(event, out, commands)
                case Ended() | Broke():
                    out += self._end(event)
                case _:
                    out.append(event)
        return out, commands

    def _guard(self, event: Opened | NewToken, out: list[Event], commands: list[TextCommand]) -> None:
        """A text that cannot be decoded ends its own generation and harms no other."""
        output = self._outputs[event.run]
        try:
            if isinstance(event, Opened):
                output.text.replay(event.resume)
            else:
                out.append(self._produced(output, event))
        except KVCacheError as error:
            self._break(event.run, error, out, commands)
        except Exception:  # foreign code over a foreign vocabulary
            log.exception("the output of a generation could not be decoded")
            unknown = InternalError("the output could not be decoded; the worker's log has the traceback")
            self._break(event.run, unknown, out, commands)
        if output.text.is_stopped and output.state is _State.RUNNING:
            output.state = _State.STOPPED
            commands.append(Finish(event.run, output.num_tokens))

    def _produced(self, output: _Output, event: NewToken) -> Produced:
        text = output.text.push(event.token)
        if event.is_last:
            text += output.text.finish()
        output.num_tokens += 1
        return Produced(event.run, (event.token,), (text,), () if event.logprobs is None else (event.logprobs,))

    def _break(self, run: RunId, error: KVCacheError, out: list[Event], commands: list[TextCommand]) -> None:
        self._outputs[run].state = _State.BROKEN
        out.append(Broke(run, error))
        commands.append(Fail(run, error))

    def _end(self, event: Ended | Broke) -> list[Event]:
        """One that ended before it was opened has no output: its prompt could not be encoded, say."""
        output = self._outputs.pop(event.run, None)
        if output is None or output.state is _State.RUNNING:
            return [event]
        if output.state is _State.BROKEN:
            return []
        return [replace(event, finish_reason=FinishReason.STOP) if isinstance(event, Ended) else event]
