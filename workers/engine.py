"""The engine's thread: commands from the loop in, model steps, events to the loop out.

    loop --commands--> inbox --> kvcache-engine: Host --ids--> kvcache-detok: Texts --events--> loop
                         ^            |                           |
                         |<--results-- kvcache-load, kvcache-text |
                         '<------------ where outputs end --------'

One thread owns every scheduler, pool and model. Three more do what would make all streams wait, loading a model,
turning a prompt into tokens and tokens into text, and hand their results in through the same inbox. A step is never
interrupted: a command takes effect before the next one. Threads are daemons, so that a model that is still
loading does not hold up the end of the process; `close` waits for the step that runs.
"""

from __future__ import annotations

import asyncio
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Self

from workers.engine_api import Command, EngineEvent, EngineFigures, OnEvents
from workers.host import Host, Result
from workers.loading import Loading, Models
from workers.model_budget import ModelBudget
from workers.tasks import MAX_NUM_SEQS, CacheConfig
from workers.texts import Texts

log = logging.getLogger(__name__)

CLOSE_S = 5.0
HELPER_CLOSE_S = 0.2
_IDLE_S = 60.0
ENCODE_S = 0.002
"""What a step may be delayed by for prompts that came just before it. Most are encoded within a fraction of that, and
one that misses a step waits for the whole of it, some 20 ms and more."""
FIGURES_S = 0.025
"""How often figures are made anew between steps, which keeps the next one waiting; the loop looks each 50 ms."""

Job = Callable[[], None]


class JobThread:
    """A named thread that does one job after the other. A job that raises is logged; jobs answer for themselves."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        self._jobs.put(job)

    def close(self) -> None:
        """Take no more jobs; the one that runs ends with the process if it must."""
        self._jobs.put(None)

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread to end; False if it has not."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception:  # the thread's outermost edge
                log.exception("a job of thread %s failed", self._thread.name)


class EngineThread:
    """Runs a `Host` beside the loop it was made in. `with` it, or `close` it.

    on_load: called from the load thread at each stage of a load.
    """

    def __init__(
        self,
        models: Models,
        budget: ModelBudget,
        on_events: OnEvents,
        *,
        on_load: Callable[[], object] = lambda: None,
        max_tokens_per_step: int,
        max_num_seqs: int = MAX_NUM_SEQS,
        shares_prefixes: bool = True,
        cache: CacheConfig = CacheConfig(),
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_events = on_events
        self._on_load = on_load
        self._inbox: queue.SimpleQueue[Command | Result | None] = queue.SimpleQueue()
        self._loader = JobThread("kvcache-load")
        self._text = JobThread("kvcache-text")
        self._detok = JobThread("kvcache-detok")
        self._texts = Texts()  # of that thread
        self._host = Host(
            models,
            budget,
            load=lambda job: self._loader.submit(lambda: self._inbox.put(job())),
            report=self._report,
            encode=lambda job: self._text.submit(lambda: self._inbox.put(job())),
            max_tokens_per_step=max_tokens_per_step,
            max_num_seqs=max_num_seqs,
            shares_prefixes=shares_prefixes,
            cache=cache,
        )
        self._figures = self._host.figures()
        self._thread = threading.Thread(target=self._run, name="kvcache-engine", daemon=True)
        self._thread.start()

    def send(self, command: Command) -> None:
        """Hand over a command; never blocks."""
        self._inbox.put(command)

    def figures(self) -> EngineFigures:
        """The latest snapshot: a frozen value that the engine replaces now and then, and whenever it falls idle."""
        return self._figures

    @property
    def is_alive(self) -> bool:
        """False once it was closed, or has met a fault of its own: its log has the traceback, nothing here goes on."""
        return self._thread.is_alive()

    def close(self) -> None:
        """End the engine after the step that runs. Events not yet delivered are lost."""
        self._inbox.put(None)
        self._loader.close()
        self._text.close()
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            log.warning("the engine is still in a step after %.0f s; leaving it behind", CLOSE_S)
        self._detok.close()
        for helper in (self._loader, self._text, self._detok):
            helper.join(HELPER_CLOSE_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> None:
        try:
            self._work()
        except Exception:  # the thread's outermost edge: what it owns can no longer be trusted
            log.exception("the engine has failed")

    def _work(self) -> None:
        is_busy, figures_due = False, 0.0
        while self._take_commands(is_busy):
            is_busy = self._host.step(time.monotonic)
            events = self._host.take_events()
            if events:
                self._detok.submit(partial(self._say, events))
            now = time.monotonic()
            if not is_busy or now >= figures_due:
                self._figures, figures_due = self._host.figures(), now + FIGURES_S

    def _report(self, news: Loading) -> None:
        self._on_load()
        self._inbox.put(news)

    def _say(self, events: Sequence[EngineEvent]) -> None:
        heard, commands = self._texts.translate(events)
        for command in commands:
            self._inbox.put(command)
        if heard and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._on_events, heard)

    def _take_commands(self, is_busy: bool) -> bool:
        """Feed the host all that has come; when there is nothing to compute, wait for something. False: the end."""
        wait_s = 0.0 if is_busy else min(_IDLE_S, max(0.0, self._host.next_deadline - time.monotonic()))
        num_encoding, until = self._host.num_encoding, math.inf
        while True:
            try:
                item = self._inbox.get(timeout=wait_s) if wait_s > 0 else self._inbox.get_nowait()
            except queue.Empty:
                return True
            if item is None:
                return False
            now = time.monotonic()
            self._host.handle(item, now)
            wait_s = 0.0
            if self._host.num_encoding > num_encoding:
                until = min(until, now + ENCODE_S)
                wait_s = until - now
