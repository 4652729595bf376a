"""The synchronous client: any thread, no hanging, clear errors. Its broker is played by a small machine of its own."""

from __future__ import annotations

import asyncio
import gc
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pytest

from bus import messages as m
from bus import wire
from bus.errors import BadArgument, BadTensor, Cancelled, ConnectionLost, NotFound
from bus.stats import BrokerStats, ClusterStats, Explanation, WorkerView, pack
from bus.tensors import TensorMeta
from kvcache import Client, Done, Start, Token
from tests.unit.kvcache.scripted_broker import ScriptedBroker, ended, scripted_broker, some_tokens, started

TEXT = [72, 105, 33]


class Machine(threading.Thread):
    """A broker with one worker that keeps K and V of single layers and always generates the same three tokens."""

    def __init__(self) -> None:
        super().__init__(name="broker of the test", daemon=True)
        self.url = ""
        self.ready = threading.Event()
        self.cancelled = threading.Event()
        self.was_asked = threading.Event()
        self._kept: dict[str, tuple[TensorMeta, list[bytes]]] = {}

    def run(self) -> None:
        with suppress(asyncio.CancelledError):
            asyncio.run(self._serve())

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._task.cancel)
        self.join(5.0)
        assert not self.is_alive()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        async with scripted_broker() as broker:
            broker.max_inline_bytes = 1 << 16
            self.url = broker.url
            self.ready.set()
            while True:
                message, payload = await broker.asked.get()
                self._answer(broker, message, payload)

    def _answer(self, broker: ScriptedBroker, message: m.Message, payload: list[bytes]) -> None:
        match message:
            case m.Generate():
                broker.reply(started(message))
                broker.publish(message.stream_id, some_tokens(message, 0, TEXT))
                if payload[0] != b"for ever":
                    broker.reply(ended(message, TEXT))
            case m.Cancel():
                self.cancelled.set()
            case m.Put(seq_id="silence"):
                self.was_asked.set()
            case m.Put() | m.Append():
                self._kept[message.seq_id] = (message.k, payload)
                broker.reply(m.KvDone(req_id=message.req_id, length=message.k.shape[0]))
            case m.Get() if message.seq_id in self._kept:
                meta, data = self._kept[message.seq_id]
                parts = wire.describe(data)
                broker.reply(m.KvValue(req_id=message.req_id, k=meta, v=meta, length=1, payload=parts), *data)
            case m.Get():
                broker.reply(wire.failed(message.req_id, NotFound(f"no sequence {message.seq_id}")))
            case m.Length() | m.Delete() | m.Pin() | m.Unpin():
                broker.reply(m.KvDone(req_id=message.req_id, length=7, count=2))
            case m.Query():
                packed = pack(CLUSTER)
                broker.reply(m.QueryReply(req_id=message.req_id, payload=wire.describe([packed])), packed)
            case m.Route():
                packed = pack(EXPLANATION)
                parts = wire.describe([packed])
                broker.reply(m.Routed(req_id=message.req_id, worker_id="w1", reason="r", payload=parts), packed)


EXPLANATION = Explanation(policy="p", key="k", worker_id="w1", reason="r", ring_epoch="e")
CLUSTER = ClusterStats(
    healthy=True,
    broker=BrokerStats(incarnation=1, state="serving", policy="p"),
    workers=(
        WorkerView(
            worker_id="w1", status="ready", weight=1, share=1.0, inflight=0, dispatched=0, last_heard_s=0.0, lease_s=2.0
        ),
    ),
)


@pytest.fixture
def machine() -> Iterator[Machine]:
    machine = Machine()
    machine.start()
    assert machine.ready.wait(5.0)
    yield machine
    machine.stop()


@pytest.fixture
def client(machine: Machine) -> Iterator[Client]:
    with Client(machine.url, timeout=5.0) as client:
        yield client


def test_a_generation_can_be_iterated_or_taken_whole(client: Client) -> None:
    events = list(client.generate("hi"))
    assert [type(event) for event in events] == [Start, Token, Token, Token, Done]
    assert client.generate(token_ids=[1, 2]).text() == "72 105 33 "
    with client.generate(messages=[{"role": "user", "content": "hi"}]) as generation:
        assert next(generation) == events[0]
        assert generation.result().usage.completion_tokens == 3
        assert generation.request_id == generation.result().request_id
    assert generation.text() == "72 105 33 "  # its end is kept


def test_leaving_a_generation_early_cancels_it(client: Client, machine: Machine) -> None:
    with client.generate("for ever") as generation:
        assert isinstance(next(generation), Start)
    assert machine.cancelled.wait(5.0)
    with pytest.raises(Cancelled):
        list(generation)


def test_another_thread_may_cancel_a_reader(client: Client) -> None:
    generation = client.generate("for ever")
    threading.Timer(0.2, generation.cancel).start()
    with pytest.raises(Cancelled):
        generation.text()


def test_the_kv_plane_and_the_queries_answer(client: Client) -> None:
    k = np.arange(6, dtype=np.int16).reshape(1, 2, 3)
    assert client.kv.put("a", 0, k, k * 2).length == 1
    pair = client.kv.get("a", 0)
    assert np.array_equal(pair.k, k)
    assert np.array_equal(pair.v, k * 2)
    assert client.kv.append("a", 0, k, k, at=0).durability == "mem1"
    assert client.kv.length("a", 0) == 7
    assert client.kv.delete("a") == 2
    client.kv.pin("a", 5.0)
    client.kv.unpin("a")
    with pytest.raises(NotFound, match="no sequence b"):
        client.kv.get("b", 0)
    assert client.health()
    assert client.workers() == CLUSTER.workers
    assert client.stats() == CLUSTER
    assert client.route("a") == client.route(prompt="x") == EXPLANATION


def test_mistakes_are_told_at_once(client: Client) -> None:
    k = np.zeros((1, 1, 1))
    with pytest.raises(BadArgument, match="exactly one"):
        client.generate()
    with pytest.raises(BadArgument, match="temperature"):
        client.generate("x", temperature=-1.0)
    with pytest.raises(BadTensor):
        client.kv.put("a", 0, k, k[0])
    with pytest.raises(BadArgument, match="not both"):
        client.route("a", prompt="x")
    for wrong in ({"layer": -1}, {"layer": 0, "deadline": 0.0}, {"layer": 0, "start": 2, "stop": 1}):
        with pytest.raises(BadArgument):
            client.kv.get("a", **wrong)
    with pytest.raises(BadArgument, match="limit"):
        client.kv.list(limit=0)
    with pytest.raises(BadArgument, match="ttl"):
        client.kv.pin("a", ttl=-1.0)
    with pytest.raises(BadArgument, match="tcp://HOST:PORT"):
        Client("nowhere")


def test_many_threads_share_one_client(client: Client) -> None:
    def work(number: int) -> None:
        k = np.full((1, 1, 4), number, np.int32)
        for turn in range(10):
            name = f"{number}-{turn}"
            client.kv.put(name, 0, k, k + turn)
            assert np.array_equal(client.kv.get(name, 0).v, k + turn)
            assert client.generate(name).text() == "72 105 33 "

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


def test_a_closed_client_says_so_in_every_thread(machine: Machine) -> None:
    client = Client(machine.url)
    generation = client.generate("for ever")
    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(generation.text)
        time.sleep(0.2)
        client.close()
        client.close()
        with pytest.raises(Cancelled, match="closed"):
            reader.result(5.0)
    for use in (client.health, client.stats, lambda: client.generate("x"), lambda: client.kv.length("a", 0)):
        with pytest.raises(BadArgument, match="closed"):
            use()
    generation.cancel()  # nothing is left to be stopped


def test_closing_while_other_threads_ask_hangs_nobody(machine: Machine) -> None:
    client = Client(machine.url)

    def ask() -> None:
        with suppress(Cancelled, BadArgument):
            while True:
                client.kv.length("a", 0)

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    client.close()
    for thread in threads:
        thread.join(5.0)
        assert not thread.is_alive()


INTERRUPTED = """
import gc, sys, time, weakref
import numpy as np
from kvcache import Client
with Client(sys.argv[1]) as client:
    k = np.zeros((1, 1, 4), np.float32)
    sent = weakref.ref(k)
    try:
        client.kv.put("silence", 0, k, k, deadline=600.0)
    except KeyboardInterrupt:
        pass
    del k
    until = time.monotonic() + 30.0
    while sent() is not None and time.monotonic() < until:
        gc.collect()
        time.sleep(0.01)
    assert sent() is None, "the client still holds what was to be sent"
    assert client.kv.length("a", 0) == 7
"""


def test_whoever_is_interrupted_leaves_nothing_behind(machine: Machine) -> None:
    """In a process of its own: OpenVINO gives a thread that loads it a stack for signals too small for any handler."""
    with subprocess.Popen([sys.executable, "-c", INTERRUPTED, machine.url], stderr=subprocess.PIPE) as child:
        try:
            assert machine.was_asked.wait(30.0)
            child.send_signal(signal.SIGINT)
            _, said = child.communicate(timeout=50.0)
        finally:
            child.kill()
    assert (child.returncode, said) == (0, b"")


def test_an_error_holds_nothing_of_what_was_sent(client: Client) -> None:
    gc.collect()
    gc.disable()
    try:
        with suppress(NotFound):
            client.kv.get("nowhere", 0)
        assert not [held for held in gc.get_objects() if type(held) is NotFound and "nowhere" in held.message]
    finally:
        gc.enable()


def test_a_client_that_was_forgotten_ends_its_thread(machine: Machine) -> None:
    client = Client(machine.url)
    assert client.health()
    del client
    assert "kvcache-client" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize(
    "ending",
    [
        "pass",
        "sys.exit(0)",
        "c.generate('x')",
        "import threading; threading.Thread(target=c.health, daemon=True).start()",
    ],
)
def test_an_interpreter_that_exits_does_not_hang(ending: str) -> None:
    code = f"import sys, kvcache; c = kvcache.Client('tcp://127.0.0.1:1'); c.health\n{ending}\n"
    ended_well = subprocess.run([sys.executable, "-c", code], timeout=10, capture_output=True, check=False)
    assert (ended_well.returncode, ended_well.stderr) == (0, b"")


def test_a_fork_is_told_to_make_its_own_client() -> None:
    code = (
        "import os, kvcache\n"
        "c = kvcache.Client('tcp://127.0.0.1:1')\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    try: c.stats()\n"
        "    except kvcache.BadArgument as e: os._exit(7 if 'fork' in str(e) else 8)\n"
        "    os._exit(9)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7\n"
    )
    subprocess.run([sys.executable, "-c", code], timeout=10, check=True)


def test_a_fork_in_the_middle_of_another_threads_call_hangs_neither_its_calls_nor_its_end() -> None:
    code = (
        "import os, threading, kvcache\n"
        "c = kvcache.Client('tcp://127.0.0.1:1')\n"
        "held, done = threading.Event(), threading.Event()\n"
        "def hold():\n"
        "    with c._thread._lock: held.set(); done.wait()\n"
        "t = threading.Thread(target=hold); t.start(); held.wait()\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    try: c.stats()\n"
        "    except kvcache.BadArgument as e: c.close(); os._exit(7 if 'fork' in str(e) else 8)\n"
        "    os._exit(9)\n"
        "done.set(); t.join()\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7\n"
    )
    subprocess.run([sys.executable, "-c", code], timeout=30, check=True)


def test_nobody_there_is_a_typed_error() -> None:
    with Client("tcp://127.0.0.1:1", timeout=0.3) as client:
        assert not client.health()
        with pytest.raises(ConnectionLost):
            client.generate("x").text()
