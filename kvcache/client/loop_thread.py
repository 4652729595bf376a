"""The event loop behind the client for code without asyncio, in a daemon thread of its own.

A call with one value takes a short way there and back (`ask`): no coroutine, no task and no future, one turn of the
loop to begin it, and the socket's callback that has its answer wakes whoever waits. That is a fifth of the time of a
small put. All else is a coroutine (`call`).
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine
from contextlib import nullcontext
from typing import Any, TypeVar

from bus.errors import BadArgument
from kvcache.client.calls import Call
from kvcache.client.link import Link
from kvcache.client.results import Event

T = TypeVar("T")

STOP_S = 5.0
WIND_UP_S = 1.0


class _Waiting:
    """The sink of a call whose caller's thread sleeps until it ends."""

    def __init__(self) -> None:
        self.value: Any = None
        self.error: Exception | None = None
        self.is_over = threading.Lock()
        self.is_over.acquire()

    def emit(self, event: Event) -> None:
        raise AssertionError(f"{type(event).__name__} for a call with one value")

    def settle(self, value: Any) -> None:  # noqa: ANN401  # each call has its own kind of value
        self.value = value
        self._wake()

    def fail(self, error: Exception) -> None:
        self.error = error
        self._wake()

    def _wake(self) -> None:
        if self.is_over.locked():
            self.is_over.release()


class LoopThread:
    """An event loop in a daemon thread of its own, so that an interpreter which exits never waits for it."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._pid = os.getpid()
        self._is_stopping = False
        self._lock = threading.RLock()  # what is handed over before the stop is run before it
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether coroutines can still be run."""
        return not self._is_stopping

    def ask(self, link: Link, call: Call, kind: type[T]) -> T:
        """Begin a call on a link of this loop and wait for its value, of this kind. Raises as `call` does."""
        waiting = _Waiting()
        try:
            with self._lock if self._is_ours else nullcontext():
                reason = self._why_not()
                if reason is not None:
                    raise BadArgument(reason)
                self._loop.call_soon_threadsafe(_begin, link, call, waiting)
            waiting.is_over.acquire()
        except BaseException:
            link.forget(call.key)
            raise
        try:
            if waiting.error is not None:
                raise waiting.error
            assert isinstance(waiting.value, kind)
            return waiting.value
        finally:
            del waiting  # or an error would hold itself by its traceback, and with it what was to be sent

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop and wait for it. Whoever is interrupted meanwhile has cancelled it.

        Raises BadArgument in a process that was forked from the loop's, on the loop's own thread, and after `stop`.
        """
        with self._lock if self._is_ours else nullcontext():
            reason = self._why_not()
            if reason is not None:
                work.close()
                raise BadArgument(reason)
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def stop(self, last: Coroutine[Any, Any, None]) -> None:
        """Run the last coroutine and end the thread. Safe to call twice, and from the loop's own thread."""
        with self._lock if self._is_ours else nullcontext():
            if self._is_stopping or not self._is_ours:
                last.close()
                return
            self._is_stopping = True
            asyncio.run_coroutine_threadsafe(self._finish(last), self._loop)
        if threading.current_thread() is not self._thread:
            self._thread.join(STOP_S)

    @property
    def _is_ours(self) -> bool:
        """Whether this process has the thread. In one that was forked while a thread held the lock, it stays held."""
        return os.getpid() == self._pid

    def _why_not(self) -> str | None:
        if not self._is_ours:
            return "this client was made before a fork; make a new one in the child process"
        if threading.current_thread() is self._thread:
            return "a Client cannot be used from its own event loop's thread; use AsyncClient there"
        if self._is_stopping:
            return "this client is closed; make a new one"
        return None

    async def _finish(self, last: Coroutine[Any, Any, None]) -> None:
        try:
            await last
        finally:
            self._loop.stop()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            self._loop.run_until_complete(self._wind_up())
        finally:
            self._loop.close()

    async def _wind_up(self) -> None:
        """Let those finish who wait for what has just ended."""
        others = asyncio.all_tasks() - {asyncio.current_task()}
        if others:
            _, slow = await asyncio.wait(others, timeout=WIND_UP_S)
            for task in slow:
                task.cancel()
            await asyncio.gather(*slow, return_exceptions=True)


def _begin(link: Link, call: Call, waiting: _Waiting) -> None:
    try:
        link.submit(call, waiting)
    except Exception as error:  # noqa: BLE001  # whatever it is, the caller gets it and does not sleep on
        waiting.fail(error)
