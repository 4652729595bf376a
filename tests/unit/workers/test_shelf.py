"""Several models in one worker with room for fewer: who leaves, who waits, and what is never wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bus.errors import InternalError, KVCacheError, ModelUnavailable, NoSpace, NotFound
from bus.messages import ModelState, PromptKind, Sampling
from bus.stats import ModelStats
from tests.unit.workers.conftest import NEED
from tests.unit.workers.no_kv import NoKV
from tests.unit.workers.test_engine import PROMPT, Bench, only, run_id, start, tokens_of
from workers.batch import Batch, Draw, Drawn, Outcome
from workers.engine_api import (
    Admitted,
    Answered,
    Broke,
    Ended,
    Event,
    Forgotten,
    Hold,
    Load,
    MeasureKV,
    PinKV,
    Proceed,
    Stop,
    Ticket,
    UnpinKV,
)
from workers.keys import SequenceKey
from workers.loading import Loaded, Report
from workers.model import Model, ModelFacts
from workers.model_budget import ModelBudget, ModelNeed
from workers.shelf import NO_ROOM, RETRY_LOAD_S, RETRY_ROOM_S
from workers.text import TextStream

KEY = SequenceKey("t", "s")
LONG = Sampling(max_tokens=12, temperature=0.0, ignore_eos=True)


class TinyModel(NoKV):
    """Says its own number for ever. `closed` counts: once is right."""

    def __init__(self, name: str, token: int) -> None:
        self.facts = ModelFacts(
            name=name,
            fingerprint=name,
            dtype="float32",
            kv_dtype="float32",
            device="cpu",
            num_layers=1,
            num_kv_heads=1,
            head_dim=1,
            vocab_size=300,
            max_model_len=64,
            eos_ids=frozenset(),
            num_blocks=64,
            block_size=4,
            block_bytes=10,
            kv_tolerance=0.0,
        )
        self._token = token
        self.closed = 0

    def encode(self, kind: PromptKind, prompt: bytes, special: bool = True) -> tuple[int, ...]:
        return tuple(prompt[::4])

    def spell(self, tokens: bytes, each: bool) -> tuple[str, ...]:
        raise AssertionError

    def open_text(self, stops: Sequence[str], min_tokens: int) -> TextStream:
        return TextStream(self, stops, min_tokens)

    def decode(self, token_ids: Sequence[int]) -> str:
        return "." * len(token_ids)

    def compute(self, batch: Batch, draws: Sequence[Draw | None]) -> list[Outcome]:
        assert not self.closed, "a model that has left computes"
        return [Drawn(self._token) if piece.wants_logits else None for piece in batch]

    def close(self) -> None:
        self.closed += 1


class TinyModels:
    """Models `a` to `d`, which say 1 to 4. `broken`: names that cannot be loaded now."""

    def __init__(self, need: ModelNeed = NEED) -> None:
        self.need = need
        self.broken: dict[str, KVCacheError] = {}
        self.loads: Counter[str] = Counter()
        self.made: list[TinyModel] = []

    def names(self) -> list[str]:
        return list("abcd")

    def choose(self, name: str) -> str:
        return name or "a"

    def check(self, name: str) -> None:
        raise ModelUnavailable(name)

    def measure(self, name: str, report: Report) -> ModelNeed:
        return self.need

    def load(self, name: str, pool_bytes: int, report: Report) -> Model:
        self.loads[name] += 1
        report("reading weights", 0.5)
        if name in self.broken:
            raise self.broken[name]
        model = TinyModel(name, 1 + self.names().index(name))
        self.made.append(model)
        return model

    def num_in_memory(self) -> int:
        return sum(1 for model in self.made if not model.closed)


def room_for(num: int) -> ModelBudget:
    return ModelBudget(pools_bytes=num * 40, model_bytes=num * (NEED.weights_bytes + 40), num_named=num)


def bench_of(models: TinyModels, num: int = 1) -> Bench:
    return Bench(models, budget=room_for(num), max_tokens_per_step=64)


def state_of(bench: Bench, name: str) -> ModelStats:
    return next(model for model in bench.host.figures().models if model.name == name)


def states(bench: Bench) -> str:
    """The models that are in memory."""
    return "".join(it.name for it in bench.host.figures().models if it.state == ModelState.READY)


def ask(bench: Bench, run: int, model: str, **more: object) -> list[Event]:
    bench.tell(start(run, model=model, **more))  # type: ignore[arg-type]  # any of its parameters
    return bench.run()


def begin(bench: Bench, run: int, model: str, sampling: Sampling = LONG) -> None:
    """Have a generation in its slot, with a token computed."""
    bench.tell(start(run, model=model, sampling=sampling))
    bench.work()
    bench.now += 1.0  # more than it took to load
    bench.step()


def test_two_models_take_turns_where_there_is_room_for_one() -> None:
    models = TinyModels()
    bench = bench_of(models)
    for run in range(6):
        name, token = ("a", 1) if run % 2 == 0 else ("b", 2)
        assert tokens_of(ask(bench, run, name), run) == [token] * 6
        assert states(bench) == name
        assert models.num_in_memory() == 1
    assert models.loads == {"a": 3, "b": 3}
    assert [model.closed for model in models.made] == [1, 1, 1, 1, 1, 0]
    stats = state_of(bench, "a")
    assert (stats.state, stats.loads, stats.unloads, stats.weights_bytes) == ("absent", 3, 3, 0)
    assert state_of(bench, "b").weights_bytes == NEED.weights_bytes


def test_the_least_recently_used_leaves_and_no_more_than_must() -> None:
    models = TinyModels()
    bench = bench_of(models, 3)
    for run, name in enumerate("abca"):
        bench.now += 1
        ask(bench, run, name)
    ask(bench, 9, "d")
    assert states(bench) == "acd"


def test_totals_go_on_counting_when_a_model_has_left() -> None:
    bench = bench_of(TinyModels())
    ask(bench, 1, "a")
    ask(bench, 2, "b")
    engine = bench.host.figures().engine
    assert (engine.finished, engine.completion_tokens) == (2, 12)


def test_a_model_is_not_unloaded_while_it_generates_and_nobody_hears_of_the_other() -> None:
    models = TinyModels()
    bench = bench_of(models)
    begin(bench, 1, "a")
    events = bench.tell(start(2, model="b"))
    bench.work()
    bench.step()
    assert state_of(bench, "b").stage == "waiting for room"
    assert state_of(bench, "a").stage == "leaving for another model"
    assert states(bench) == "a"
    events += bench.run()
    assert len(tokens_of(events, 1)) == 12
    assert tokens_of(events, 2) == [2] * 6
    first_of_2 = events.index(next(e for e in events if isinstance(e, Admitted) and e.run == run_id(2)))
    end_of_1 = events.index(next(e for e in events if isinstance(e, Ended) and e.run == run_id(1)))
    assert end_of_1 < first_of_2
    assert states(bench) == "b"


def test_whoever_asks_for_a_model_that_is_about_to_leave_gets_it_after_the_other_had_its_turn() -> None:
    models = TinyModels()
    bench = bench_of(models)
    begin(bench, 1, "a")
    bench.tell(start(2, model="b"))
    bench.work()
    bench.step()
    bench.tell(start(3, model="a"))
    events = bench.run()
    ends = [event.run for event in events if isinstance(event, Ended)]
    assert ends == [run_id(1), run_id(2), run_id(3)]
    assert tokens_of(events, 3) == [1] * 6
    assert models.loads == {"a": 2, "b": 1}


def test_a_busy_model_stays_at_least_as_long_as_it_took_to_load() -> None:
    models = TinyModels()
    bench = bench_of(models)
    bench.tell(start(1, model="a", sampling=LONG))
    bench.host.handle(bench.jobs.pop(0)(), bench.now)
    loaded = bench.jobs.pop(0)()
    assert isinstance(loaded, Loaded)
    bench.host.handle(Loaded("a", loaded.result, 5.0), bench.now)
    bench.work()
    bench.step()
    bench.tell(start(2, model="b"))
    bench.work()
    bench.step()
    assert bench.host.next_deadline == 5.0
    assert state_of(bench, "a").stage == ""
    bench.tell(start(3, model="a"))
    bench.work()
    bench.step()
    bench.now = 5.0
    bench.step()
    assert state_of(bench, "a").stage == "leaving for another model"
    events = bench.run()
    assert len(tokens_of(events, 3)) + 1 >= 6, "it began before the model was to leave"
    assert tokens_of(events, 2) == [2] * 6


def test_a_model_need_not_leave_once_nobody_waits_for_the_other() -> None:
    models = TinyModels()
    bench = bench_of(models)
    begin(bench, 1, "a")
    bench.tell(start(2, model="b"))
    bench.work()
    bench.step()
    bench.tell(start(3, model="a"), Stop(run_id(2)))
    events = bench.run()
    assert tokens_of(events, 3) == [1] * 6
    assert models.loads == {"a": 1}
    assert state_of(bench, "b").reason == NO_ROOM


def test_prompts_on_their_way_keep_their_model() -> None:
    models = TinyModels()
    bench = bench_of(models)
    ask(bench, 1, "a")
    bench.tell(start(2, model="a"))
    encode = bench.jobs.pop(0)
    bench.tell(start(3, model="b"))
    bench.work()
    bench.step()
    assert states(bench) == "a"
    bench.host.handle(encode(), bench.now)
    events = bench.run()
    assert tokens_of(events, 2) == [1] * 6
    assert tokens_of(events, 3) == [2] * 6


def test_a_prompt_that_was_stopped_or_is_wrong_does_not_keep_its_model() -> None:
    models = TinyModels()
    bench = bench_of(models)
    ask(bench, 1, "a")
    bench.tell(start(2, model="a"), Stop(run_id(2)))
    bench.tell(start(3, model="a", sampling=Sampling(stop_token_ids=(3000,))))
    bench.run()
    assert tokens_of(ask(bench, 4, "b"), 4) == [2] * 6


def test_named_sequences_leave_with_their_model_and_are_missed_not_made_up() -> None:
    bench = bench_of(TinyModels())
    ask(bench, 1, "a", seq_id="s")
    events = ask(bench, 2, "b")
    assert only(events, Forgotten) == Forgotten(KEY)
    assert isinstance(only(bench.tell(MeasureKV(Ticket(1), KEY, 0)), Answered).answer, NotFound)
    again = ask(bench, 3, "a", seq_id="s", prompt=[*PROMPT, 1, 1, 1])
    assert next(e for e in again if isinstance(e, Admitted)).cached_tokens == 0
    assert tokens_of(again, 3) == [1] * 6


def test_a_model_with_a_pinned_sequence_does_not_leave_and_who_needs_the_room_is_told() -> None:
    models = TinyModels()
    bench = bench_of(models)
    ask(bench, 1, "a", seq_id="s")
    bench.tell(PinKV(Ticket(1), KEY, 10.0))
    error = only(ask(bench, 2, "b"), Broke).error
    assert isinstance(error, NoSpace)
    assert "unpin" in error.message
    assert states(bench) == "a"
    bench.tell(UnpinKV(Ticket(2), KEY))
    bench.now = RETRY_ROOM_S
    assert tokens_of(ask(bench, 3, "b"), 3) == [2] * 6


def test_a_pin_that_ran_out_keeps_no_model() -> None:
    bench = bench_of(TinyModels())
    ask(bench, 1, "a", seq_id="s")
    bench.tell(PinKV(Ticket(1), KEY, 10.0))
    bench.now = 10.0
    assert tokens_of(ask(bench, 2, "b"), 2) == [2] * 6


def test_another_than_the_pinned_one_leaves() -> None:
    bench = bench_of(TinyModels(), 2)
    ask(bench, 1, "a", seq_id="s")
    bench.tell(PinKV(Ticket(1), KEY, 10.0))
    bench.now = 1.0
    ask(bench, 2, "b")
    ask(bench, 3, "c")
    assert states(bench) == "ac"


def test_preloading_loads_what_fits_and_makes_nobody_leave() -> None:
    models = TinyModels()
    bench = bench_of(models, 2)
    bench.tell(*(Load(name) for name in "abcd"))
    bench.run()
    assert states(bench) == "ab"
    assert [state_of(bench, name).reason for name in "cd"] == [NO_ROOM] * 2
    assert tokens_of(ask(bench, 1, "d"), 1) == [4] * 6


def test_a_model_that_fails_makes_room_again_and_keeps_nobody_else_from_loading() -> None:
    models = TinyModels()
    models.broken["b"] = ModelUnavailable("the weights are truncated")
    bench = bench_of(models)
    bench.tell(start(1, model="b"), start(2, model="b"), start(3, model="a"))
    events = bench.run()
    assert [event.run for event in events if isinstance(event, Broke)] == [run_id(1), run_id(2)]
    assert models.loads["b"] == 1
    assert tokens_of(events, 3) == [1] * 6
    models.broken.clear()
    bench.now = RETRY_LOAD_S
    assert tokens_of(ask(bench, 4, "b"), 4) == [2] * 6


def test_the_error_of_a_failed_load_holds_on_to_nothing_and_does_not_grow() -> None:
    models = TinyModels()
    models.broken["b"] = ModelUnavailable("no")
    models.broken["b"].__cause__ = InternalError("of")
    bench = bench_of(models)
    ask(bench, 1, "b")
    depths = []
    for run in range(2, 5):
        error = only(bench.tell(start(run, model="b")), Broke).error
        trace, depth = error.__traceback__, 0
        while trace is not None:
            trace, depth = trace.tb_next, depth + 1
        depths.append(depth)
    assert len(set(depths)) == 1, depths
    assert models.broken["b"].__cause__ is None


def test_a_model_larger_than_all_room_is_refused_and_nobody_left_for_it() -> None:
    models = TinyModels()
    bench = bench_of(models)
    ask(bench, 1, "a")
    models.need = ModelNeed(weights_bytes=1 << 40, block_bytes=10)
    error = only(ask(bench, 2, "b"), Broke).error
    assert isinstance(error, ModelUnavailable)
    assert "--model-memory-bytes" in error.message
    assert states(bench) == "a"


def test_a_held_stream_keeps_its_model_until_it_has_ended() -> None:
    bench = bench_of(TinyModels())
    begin(bench, 1, "a")
    bench.tell(Hold(run_id(1)))
    bench.tell(start(2, model="b"))
    assert tokens_of(bench.run(), 2) == []
    bench.tell(Proceed(run_id(1)))
    assert tokens_of(bench.run(), 2) == [2] * 6


def test_progress_of_a_load_can_be_seen() -> None:
    bench = bench_of(TinyModels())
    bench.tell(Load("a"))
    bench.host.handle(bench.jobs.pop(0)(), 0.0)
    result = bench.jobs.pop(0)()
    stats = state_of(bench, "a")
    assert (stats.state, stats.stage, stats.progress) == ("loading", "reading weights", 0.5)
    bench.host.handle(result, 0.0)
    stats = state_of(bench, "a")
    assert (stats.state, stats.stage, stats.progress) == ("ready", "", 0.0)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    num_models=st.integers(1, 3),
    events=st.lists(
        st.one_of(
            st.tuples(st.just("start"), st.sampled_from("abcd")),
            st.tuples(st.just("stop"), st.integers(0, 30)),
            st.tuples(st.just("step"), st.integers(0, 3)),
            st.tuples(st.just("job"), st.integers(0, 3)),
            st.tuples(st.just("break"), st.sampled_from("abcd")),
            st.tuples(st.just("mend"), st.sampled_from("abcd")),
            st.tuples(st.just("pin"), st.integers(0, 30)),
        ),
        max_size=60,
    ),
)
def test_whatever_happens_every_request_ends_once_with_its_own_models_tokens(
    num_models: int, events: list[tuple[str, object]]
) -> None:
    models = TinyModels()
    bench = bench_of(models, num_models)
    asked: dict[int, str] = {}
    stopped: set[int] = set()
    heard: list[Event] = []
    for what, value in events:
        bench.now += 0.1
        match what, value:
            case "start", str(name):
                run = len(asked)
                asked[run] = name
                heard += bench.tell(start(run, model=name, seq_id=f"s{run % 5}" if run % 3 == 0 else ""))
            case "stop", int(run):
                if run in asked:
                    stopped.add(run)
                    heard += bench.tell(Stop(run_id(run)))
            case "step", int(count):
                for _ in range(count):
                    bench.step()
                    heard += bench.hear()
            case "job", int(count):
                for _ in range(min(count, len(bench.jobs))):
                    bench.host.handle(bench.jobs.pop(0)(), bench.now)
            case "break", str(name):
                models.broken[name] = ModelUnavailable("broken")
            case "mend", str(name):
                models.broken.pop(name, None)
            case "pin", int(run):
                heard += bench.tell(PinKV(Ticket(run), SequenceKey("t", f"s{run % 5}"), bench.now + 0.3))
        assert models.num_in_memory() <= num_models + len(bench.jobs)  # one that is to close is a job
    while bench.step() or bench.jobs:
        bench.now += 0.1
        bench.work()
        heard += bench.hear()
    heard += bench.hear()
    ends = Counter(event.run for event in heard if isinstance(event, Ended | Broke))
    assert set(ends.values()) <= {1}
    for run, name in asked.items():
        assert run_id(run) in ends or run in stopped, f"nobody heard how {run} ended"
        assert set(tokens_of(heard, run)) <= {1 + models.names().index(name)}
    assert models.num_in_memory() <= num_models
    figures = bench.host.figures()
    assert figures.engine.waiting == figures.engine.running == 0
