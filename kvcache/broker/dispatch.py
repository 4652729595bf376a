"""A request that has been placed, on its way to its worker: the envelope, and what others must hear before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bus import messages as m
from bus import wire
from bus.wire import Buffer
from kvcache.broker.journal import Journal
from kvcache.broker.knowledge import Knowledge
from kvcache.broker.members import Call, Workers
from kvcache.broker.pulls import can_pull, order_pull
from kvcache.broker.sends import Port, Send
from kvcache.broker.sequences import Sequences
from kvcache.routing.views import Choice


class Dispatch:
    """`new_id` makes 16 secret random bytes."""

    def __init__(
        self,
        workers: Workers,
        knowledge: Knowledge,
        sequences: Sequences,
        journal: Journal,
        new_id: Callable[[], bytes],
    ) -> None:
        self.pulls_ordered = 0
        self._workers = workers
        self._knowledge = knowledge
        self._sequences = sequences
        self._journal = journal
        self._new_id = new_id

    def assign(
        self,
        call: Call,
        message: m.Dispatched,
        choice: Choice,
        frames: Sequence[Buffer],
        version: int,
        copies: int = 1,
    ) -> list[Send]:
        """The request for its worker, and before it what another one hears that it is to copy from."""
        self._workers.count_dispatch(call.worker)
        self._knowledge.touch(call.worker)
        self._journal.placed(call, message, choice.reason)
        order, grants = self._order_pull(call, message, choice)
        envelope = m.Assign(
            call=call.id,
            tenant=call.client.user_id,
            client=call.client.instance,
            deadline_ms=message.deadline_ms,
            reason=choice.reason,
            pull=order,
            newest=self._sequences.use(call.name).version if call.name else 0,
            version=version,
            copies=copies,
            trace="" if call.span is None else str(call.span.context),
        )
        port, link = (Port.WORKER_BULK, call.worker.bulk_link) if call.on_bulk else (Port.WORKER, call.worker.link)
        return [*grants, Send(port, link, [wire.encode(envelope), *frames], call)]

    def _order_pull(self, call: Call, message: m.Dispatched, choice: Choice) -> tuple[m.PullOrder | None, list[Send]]:
        """What the worker is to copy first, if the choice says so and it can, and the holder's ticket for it."""
        if choice.pull is None or not isinstance(message, m.Generate):
            return None, []
        source = self._workers.by_id.get(choice.pull.source)
        if source is None or not can_pull(source, call.worker):
            return None, []
        self.pulls_ordered += 1
        self._knowledge.pulls(call)
        order, grant = order_pull(choice.pull, source, call.worker, message, call.client.user_id, self._new_id())
        return order, [grant]
