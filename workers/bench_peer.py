"""Our own engine behind the contract of the engine benchmark: `python -m workers.bench_peer [torch|openvino]`.

The host runs in this thread, step by step, as the engine's thread runs it in a worker, which makes text of tokens
elsewhere; no bus is involved. Besides what every engine answers, it tells how the time of its steps was spent and what
one step costs at a given context and batch.
"""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import torch
from safetensors import safe_open

from bus.messages import PromptKind, Sampling
from kvcache.bench.peers.contract import serve
from kvcache.hashing import encode_token_ids
from workers.batch import Batch, Draw, Outcome
from workers.engine_api import Broke, EngineEvent, Load, NewToken, RunId, Start
from workers.host import Host, Result
from workers.loader import DTypeName
from workers.loading import Report
from workers.model import Model
from workers.model_budget import ModelBudget
from workers.runners import RunnerName
from workers.tasks import CacheConfig
from workers.torch_model import LoadOptions, TorchModel, TorchModels

POOL_BYTES = 2 << 30
MAX_TOKENS_PER_STEP = 256
MAX_NUM_SEQS = 64
GROWTH_CONTEXTS = (128, 512, 2048, 8064)  # whole blocks, below the 8,192 that the model allows
GROWTH_BATCHES = (1, 4, 16, 64)
GROWTH_STEPS = 6
CEILING_RUNS = 5


class _Timed:
    """A model that adds up the seconds of its forward passes and draws."""

    def __init__(self, model: TorchModel, clock: _Clock) -> None:
        self._model, self._clock = model, clock

    def __getattr__(self, name: str) -> object:
        return getattr(self._model, name)

    def compute(self, batch: Batch, draws: Sequence[Draw | None]) -> list[Outcome]:
        started = time.perf_counter()
        drawn = self._model.compute(batch, draws)
        self._clock.add(time.perf_counter() - started, is_decode=all(len(each.token_ids) == 1 for each in batch))
        return drawn


class _Clock:
    """Seconds of all steps, of the model's part of them, and of the steps that computed one token per sequence."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.stepping_s = self.computing_s = self.decoding_s = 0.0
        self.num_steps = self.num_decodes = 0

    def add(self, seconds: float, *, is_decode: bool) -> None:
        self.computing_s += seconds
        if is_decode:
            self.decoding_s += seconds
            self.num_decodes += 1


class _TimedModels:
    def __init__(self, models: TorchModels, clock: _Clock) -> None:
        self._models, self._clock = models, clock
        self.names, self.choose, self.check, self.measure = models.names, models.choose, models.check, models.measure

    def load(self, name: str, pool_bytes: int, report: Report) -> Model:
        return cast("Model", _Timed(self._models.load(name, pool_bytes, report), self._clock))


class Ours:
    """One model in one host."""

    extras = frozenset({"spent", "growth", "ceilings"})

    def __init__(self, runner: RunnerName) -> None:
        self._runner: RunnerName = runner
        self._jobs: deque[Callable[[], Result]] = deque()
        self._clock = _Clock()
        self._num_runs = 0

    def load(self, model: str, threads: int, dtype: str) -> dict[str, str]:
        started = time.perf_counter()
        options = LoadOptions(
            dtype=cast("DTypeName", dtype),
            device="cpu",
            max_model_len=None,
            block_size=32,
            threads=threads,
            runner=self._runner,
        )
        models = TorchModels(Path.home(), [model], options)
        self._host = Host(
            _TimedModels(models, self._clock),
            ModelBudget(pools_bytes=POOL_BYTES, num_named=1),
            load=self._jobs.append,
            report=lambda news: None,
            encode=self._jobs.append,
            max_tokens_per_step=MAX_TOKENS_PER_STEP,
            max_num_seqs=MAX_NUM_SEQS,
            shares_prefixes=True,
            cache=CacheConfig(),
        )
        self._host.handle(Load(models.choose("")), 0.0)
        self._work()
        (figures,) = self._host.figures().models
        self._dtype: torch.dtype = getattr(torch, figures.dtype)
        self._num_weights = _num_weights(Path(model))
        if figures.state != "ready":
            raise RuntimeError(figures.reason)
        return {
            "engine": f"kvcache, {figures.runner} runner",
            "dtype": figures.dtype,
            "load_s": f"{time.perf_counter() - started:.1f}",
        }

    def run(self, prompts: list[list[int]], max_tokens: int) -> int:
        sampling = Sampling(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        for prompt in prompts:
            self._num_runs += 1
            self._host.handle(self._start(prompt, sampling), time.monotonic())
        self._work()
        num_tokens = 0
        is_busy = True
        while is_busy:
            started = time.perf_counter()
            is_busy = self._host.step(time.monotonic)
            events = self._host.take_events()
            self._clock.stepping_s += time.perf_counter() - started
            self._clock.num_steps += is_busy
            num_tokens += _count(events)
            self._work()
        return num_tokens

    def spent(self) -> dict[str, float]:
        """Seconds of all steps since the last time, of the model's part of them, and how many there were."""
        clock = self._clock
        figures = {"steps": clock.num_steps, "stepping_s": clock.stepping_s, "computing_s": clock.computing_s}
        clock.reset()
        return figures

    def growth(self) -> dict[str, list[list[float]]]:
        """Milliseconds per decode step by context and batch, as [context, batch, ms]; the batch shares its context.

        Sharing keeps the pool small; a step reads each sequence's context all the same.
        """
        rows = []
        for context in GROWTH_CONTEXTS:
            prefix = [1000 + number % 40_000 for number in range(context)]
            self.run([prefix], 1)
            for batch in GROWTH_BATCHES:
                prompts = [[*prefix, 1000 + number] for number in range(batch)]
                self._clock.reset()
                self.run(prompts, GROWTH_STEPS)
                rows.append([context, batch, 1000 * self._clock.decoding_s / self._clock.num_decodes])
        return {"rows": rows}

    def ceilings(self) -> dict[str, float]:
        """What the machine can do with the threads the model has: bytes read per second, and operations per second
        in matrix products of the model's dtype; and the model's own sizes."""
        return {
            "bytes_per_s": _read_rate(),
            "flops_per_s": _product_rate(self._dtype),
            "weight_bytes": self._num_weights * self._dtype.itemsize,
            "num_weights": self._num_weights,
        }

    def _start(self, prompt: list[int], sampling: Sampling) -> Start:
        return Start(
            run=RunId(self._num_runs.to_bytes(8, "big")),
            tenant="bench",
            model="",
            kind=PromptKind.TOKENS,
            prompt=encode_token_ids(prompt),
            resume=(),
            sampling=sampling,
            seq_id="",
            cache_salt="",
            deadline=math.inf,
        )

    def _work(self) -> None:
        while self._jobs:
            self._host.handle(self._jobs.popleft()(), time.monotonic())


def _count(events: Sequence[EngineEvent]) -> int:
    for event in events:
        if isinstance(event, Broke):
            raise event.error
    return sum(isinstance(event, NewToken) for event in events)


def _num_weights(folder: Path) -> int:
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 (no dict)
    return total


def _read_rate() -> float:
    numbers = torch.ones(1 << 28, dtype=torch.float32)
    return _best(lambda: numbers.sum(), numbers.nbytes)


def _product_rate(dtype: torch.dtype) -> float:
    size = 2048
    left, right = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    return _best(lambda: left @ right, 2 * size**3)


def _best(work: Callable[[], object], amount: float) -> float:
    """Amount per second in the best of some runs: a ceiling, not a median."""
    best = 0.0
    for _ in range(CEILING_RUNS):
        started = time.perf_counter()
        work()
        best = max(best, amount / (time.perf_counter() - started))
    return best


if __name__ == "__main__":
    serve(Ours(cast("RunnerName", sys.argv[1] if len(sys.argv) > 1 else "auto")))
