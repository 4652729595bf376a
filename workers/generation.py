"""One generation on its way through the scheduler: its task, its sequence, its state and its times."""

from __future__ import annotations

from dataclasses import dataclass, field

from bus.errors import BadArgument, TooLarge
from bus.limits import MAX_PRIORITY
from bus.messages import FinishReason
from kvcache.places import place_of
from workers.lifecycle import Change, State, after
from workers.sequences import Sequence
from workers.tasks import GenerationTask, SchedulerConfig, Usage


@dataclass(slots=True, eq=False)
class Generation:
    """`number` counts arrivals; times are monotonic seconds; `max_len` counts all its tokens.

    place: in line, for room and for turns, see `kvcache.places`; equals in order of arrival. It does not change while
    others come, so nobody of any class is overtaken for ever.
    token_s: seconds to compute one token, as of its arrival.
    last_turn: the number of the step in which it last got on, or was admitted.
    """

    task: GenerationTask
    sequence: Sequence
    number: int
    max_len: int
    arrived_at: float
    token_s: float = 0.0
    state: State = State.WAITING
    admitted_at: float | None = None
    first_token_at: float | None = None
    cached_tokens: int = 0
    last_turn: int = 0
    place: tuple[float, int] = field(init=False)

    def __post_init__(self) -> None:
        self.find_place(0)

    @property
    def num_outputs(self) -> int:
        return len(self.sequence.token_ids) - len(self.task.prompt)

    def find_place(self, num_left: int) -> None:
        """Its place, with so many tokens to compute before the next of its output. Not while it is in a sorted line."""
        self.place = (place_of(self.arrived_at, self.task.priority, self.token_s * num_left), self.number)

    def move(self, change: Change) -> None:
        """Change the state as the table of `workers.lifecycle` says."""
        self.state = after(self.state, change)

    def finish_reason(self) -> FinishReason | None:
        """Why its newest token is the last one, or None if it is not."""
        task = self.task
        stops = task.stop_ids if task.ignore_eos else task.stop_ids | task.eos_ids
        if self.num_outputs >= max(1, task.min_tokens) and self.sequence.token_ids[-1] in stops:
            return FinishReason.STOP
        if len(self.sequence.token_ids) >= self.max_len:
            return FinishReason.LENGTH
        return None

    def usage(self, now: float) -> Usage:
        """What it has taken until now."""
        admitted = now if self.admitted_at is None else self.admitted_at
        first = now if self.first_token_at is None else self.first_token_at
        return Usage(
            prompt_tokens=len(self.task.prompt),
            cached_tokens=self.cached_tokens,
            completion_tokens=self.num_outputs,
            queued_s=admitted - self.arrived_at,
            prefill_s=first - admitted,
            decode_s=now - first,
        )


def check_task(task: GenerationTask, config: SchedulerConfig, block_size: int) -> None:
    """Refuse what no state of the pool could make right. Raises BadArgument or TooLarge, naming the parameter."""
    if not task.prompt:
        raise BadArgument("the prompt is empty; it needs at least one token")
    for name, token_ids in (("prompt", task.prompt), ("resume", task.resume)):
        wrong = next((token for token in token_ids if not 0 <= token < config.vocab_size), None)
        if wrong is not None:
            raise BadArgument(f"{name} has token id {wrong}; this model's are 0 to {config.vocab_size - 1}")
    if len(task.prompt) >= config.max_model_len:
        limit = f"this model takes {config.max_model_len} tokens, at least one of them generated"
        raise TooLarge(f"the prompt has {len(task.prompt)} tokens; {limit}", detail=config.max_model_len)
    if task.max_tokens < 1:
        raise BadArgument(f"max_tokens must be at least 1, not {task.max_tokens}")
    if not 0 <= task.min_tokens <= task.max_tokens:
        raise BadArgument(f"min_tokens must be from 0 to max_tokens ({task.max_tokens}), not {task.min_tokens}")
    if len(task.resume) > task.max_tokens:
        raise BadArgument(f"resume has {len(task.resume)} tokens, more than max_tokens ({task.max_tokens})")
    if not -MAX_PRIORITY <= task.priority <= MAX_PRIORITY:
        raise BadArgument(f"priority must be from {-MAX_PRIORITY} to {MAX_PRIORITY}, not {task.priority}")
    if task.seed.block_size != block_size:
        raise BadArgument(f"the hash seed is for blocks of {task.seed.block_size} tokens, the pool's have {block_size}")
