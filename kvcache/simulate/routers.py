"""What decides in a modelled broker: one of our own policies, or a rival's rule with the books it keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from kvcache.ring import HashRing
from kvcache.routing.policies import Policy
from kvcache.routing.views import Belief, Choice, Refusal, Request
from kvcache.simulate.traces import Arrival
from kvcache.simulate.worker import Job


class Router(Protocol):
    """Chooses, and is told what became of it. `arrival` is for rules that keep their own record of prompts."""

    def choose(
        self, arrival: Arrival, request: Request, ring: HashRing, beliefs: Mapping[str, Belief]
    ) -> Choice | Refusal: ...

    def dispatched(self, job: Job, worker: str) -> None: ...

    def first_token(self, job: Job, worker: str) -> None: ...

    def ended(self, job: Job, worker: str) -> None: ...

    def left(self, worker: str) -> None: ...


class Stateless:
    """A router that keeps no books of its own."""

    def dispatched(self, job: Job, worker: str) -> None:
        pass

    def first_token(self, job: Job, worker: str) -> None:
        pass

    def ended(self, job: Job, worker: str) -> None:
        pass

    def left(self, worker: str) -> None:
        pass


class PolicyRouter(Stateless):
    """One of `kvcache.routing.policies`, exactly as a broker calls it."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def choose(
        self, arrival: Arrival, request: Request, ring: HashRing, beliefs: Mapping[str, Belief]
    ) -> Choice | Refusal:
        return self._policy(request, ring, beliefs)
