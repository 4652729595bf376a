"""Orders to copy KV from one worker to another: what goes with a request, and the ticket that goes to the holder.

A ticket is made for one copy, and told only to the two workers concerned: the one that copies with its assignment,
the one that holds by a `Grant`, which is sent first. Who shows it there may copy this tenant's blocks and nobody
else's, of no more tokens than the order says, once; or one sequence of this tenant's.
"""

from __future__ import annotations

from bus import messages as m
from kvcache.broker.directory import Name
from kvcache.broker.members import Worker
from kvcache.broker.sends import Send, to_worker
from kvcache.routing.views import Pull

MAX_PULL_TOKENS = 65_536
MAX_TICKET_MS = 60_000
"""A request may wait for its model to load before it pulls."""


def order_pull(
    pull: Pull, source: Worker, target: Worker, message: m.Generate, tenant: str, ticket: bytes
) -> tuple[m.PullOrder, Send]:
    """The order for `target`, and what `source` is told. `ticket`: 16 bytes that nobody can guess."""
    num_tokens = min(pull.num_tokens, MAX_PULL_TOKENS)
    order = m.PullOrder(
        worker_id=source.id,
        url=source.hello.peer_url,
        ticket=ticket,
        num_tokens=num_tokens,
        budget_ms=int(min(message.deadline_ms, 1000 * pull.budget_s)),
    )
    grant = m.Grant(
        ticket=ticket,
        target=target.id,
        tenant=tenant,
        num_tokens=num_tokens,
        ttl_ms=min(MAX_TICKET_MS, message.deadline_ms),
    )
    return order, to_worker(source, grant)


def order_copy(
    name: Name, version: int, source: Worker, target: Worker, ticket: bytes, budget_s: float
) -> tuple[Send, Send]:
    """What `source` and `target` are told, in this order, so that the latter copies a whole sequence."""
    ttl_ms = int(1000 * budget_s)
    grant = m.Grant(
        ticket=ticket, target=target.id, tenant=name.tenant, num_tokens=0, ttl_ms=ttl_ms, seq_id=name.seq_id
    )
    order = m.CopySequence(
        ticket=ticket,
        worker_id=source.id,
        url=source.hello.peer_url,
        tenant=name.tenant,
        seq_id=name.seq_id,
        version=version,
        budget_ms=ttl_ms,
    )
    return to_worker(source, grant), to_worker(target, order)


def can_pull(source: Worker, target: Worker) -> bool:
    """Whether `target` could copy from `source`: another live worker, of the same user, that can be reached."""
    return source is not target and source.user_id == target.user_id and bool(source.hello.peer_url)
