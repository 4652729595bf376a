"""One loaded model with its scheduler: commands about its generations in, events of the engine out.

The scheduler says what to compute, the model computes it, and this joins the two: it draws with each
request's own parameters and keeps a fault where it happened: numbers that are no numbers, or a pass that raises, end
those generations that make them and nobody else (`workers.computing`). Tokens become text elsewhere
(`workers.texts`), so that no step waits for it. Runs in the engine's thread only, and knows no torch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import assert_never

import msgspec

from bus.errors import BadArgument, KVCacheError, NotFound
from bus.messages import FinishReason, Sampling, TokenLogprobs
from bus.stats import EngineStats, LayerInfo, PoolStats, SequenceInfo
from kvcache.hashing import BlockHash, HashSeed
from kvcache.sampling_checks import check_vocabulary
from workers import tasks
from workers.audit import Auditor
from workers.batch import Draw, Drawn, Scored, Slice
from workers.computing import compute_step
from workers.engine_api import (
    Admitted,
    BlocksMoved,
    Broke,
    Ended,
    EngineEvent,
    Forgotten,
    NewToken,
    NodesMoved,
    Opened,
    Prefilled,
    PromptScored,
    ReadResult,
    Retained,
    RunId,
    Start,
)
from workers.keys import SequenceKey
from workers.loans import LoanId, Loans
from workers.logit_changes import LogitChanges, changes_of
from workers.model import Model
from workers.nodes import Landmark, landmarks
from workers.prefix_cache import PrefixCache
from workers.scheduler import Scheduler

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Output:
    """A generation's side that the scheduler does not know: how it is drawn, the newest token's logprobs, whether its
    client has heard that it was admitted, and what computing up to its first token took; and its task, for audits."""

    task: tasks.GenerationTask
    sampling: Sampling
    changes: LogitChanges | None
    num_tokens: int
    logprobs: TokenLogprobs | None = None
    is_admitted: bool = False
    is_prefilled: bool = False
    num_computed: int = 0
    compute_s: float = 0.0


class Slot:
    """One model at work. Every method that changes something returns the events that follow."""

    def __init__(
        self,
        model: Model,
        *,
        max_tokens_per_step: int,
        max_num_seqs: int,
        shares_prefixes: bool,
        cache: tasks.CacheConfig,
    ) -> None:
        facts = model.facts
        self.model = model
        self.shares_prefixes = shares_prefixes
        config = tasks.SchedulerConfig(
            max_model_len=facts.max_model_len,
            vocab_size=facts.vocab_size,
            max_tokens_per_step=max_tokens_per_step,
            max_num_seqs=max_num_seqs,
        )
        self._cache = PrefixCache(
            facts.num_blocks, facts.block_size, cache.eviction_policy, tells_blocks=cache.tells_blocks
        )
        self._auditor = Auditor(self._cache, cache.audit_share, facts.kv_tolerance)
        self._scheduler = Scheduler(config, self._cache)
        # A checkpoint may name ends of text that its own vocabulary does not have.
        self._eos_ids = frozenset(token for token in facts.eos_ids if token < facts.vocab_size)
        self._outputs: dict[RunId, _Output] = {}
        self._names: set[SequenceKey] = set()

    # --- generations ---

    def submit(self, start: Start, prompt: tuple[int, ...], now: float) -> list[EngineEvent]:
        """Queue a generation; one that cannot be is broken at once."""
        sampling = start.sampling
        try:
            check_vocabulary(sampling, self.model.facts.vocab_size)
            task = self._task(start, prompt)
            events = self._scheduler.submit(task, now)
        except KVCacheError as error:
            return [Broke(start.run, error)]
        changes = changes_of(sampling, prompt, start.resume)
        self._outputs[start.run] = _Output(task, sampling, changes, len(start.resume))
        text = self.model.open_text(sampling.stop, sampling.min_tokens)
        return [Opened(start.run, text, start.resume), *self._translate(events)]

    def stop(self, run: RunId, now: float) -> list[EngineEvent]:
        return self._translate(self._scheduler.cancel(run, now))

    def finish(self, run: RunId, num_tokens: int, now: float) -> list[EngineEvent]:
        """A stop string is complete with the first `num_tokens` of its output."""
        return self._translate(self._scheduler.finish(run, FinishReason.STOP, now, num_tokens))

    def fail(self, run: RunId, error: KVCacheError, now: float) -> list[EngineEvent]:
        return self._translate(self._scheduler.fail(run, error, now))

    def hold(self, run: RunId) -> None:
        self._scheduler.pause(run)

    def proceed(self, run: RunId) -> None:
        self._scheduler.resume(run)

    def step(self, clock: Callable[[], float]) -> tuple[bool, list[EngineEvent]]:
        """Run one forward pass, if anything can run; says whether it did. The pass takes time, hence a clock.

        An audit that is due follows in a pass of its own.
        """
        ran, events = self._step(clock)
        return self._audit() or ran, events

    def _step(self, clock: Callable[[], float]) -> tuple[bool, list[EngineEvent]]:
        now = clock()
        step = self._scheduler.plan(now)
        events = self._translate(step.events)
        if not step.batch:
            return False, events
        draws = [
            self._draw(RunId(key), piece) if piece.wants_logits else None
            for key, piece in zip(step.keys, step.batch, strict=True)
        ]
        sampled = compute_step(self.model, step, draws)
        begun, now = now, clock()
        events += self._share_time(step, now - begun)
        failed: list[tasks.Event] = []
        tokens: list[int | None] = []
        if isinstance(sampled, KVCacheError):
            # A copy that was not made would be missed later, by one who had no turn in this step.
            touched = dict.fromkeys([*step.keys, *(copy.key for copy in step.copies)])
            failed += [event for key in touched for event in self._scheduler.fail(key, sampled, now)]
            sampled = [None] * len(step.batch)
        for key, piece, result in zip(step.keys, step.batch, sampled, strict=True):
            drawn = result
            if isinstance(result, Scored):
                events.append(self._scored(RunId(key), piece, result.scores))
                drawn = result.drawn
            if isinstance(drawn, KVCacheError):
                failed += self._scheduler.fail(key, drawn, now)
            tokens.append(self._note(RunId(key), drawn) if isinstance(drawn, Drawn) else None)
        return True, events + self._translate([*failed, *self._scheduler.commit(step, tokens, now)])

    @property
    def next_deadline(self) -> float:
        """Monotonic seconds; `math.inf` if nothing waits for time to pass."""
        return self._scheduler.next_deadline()

    @property
    def is_busy(self) -> bool:
        """Whether any generation here has not ended."""
        return bool(self._outputs)

    # --- sequences that clients named ---

    def has(self, sequence: SequenceKey) -> bool:
        return sequence in self._names

    def read(self, sequence: SequenceKey, layer: int, start: int, stop: int | None) -> ReadResult:
        """Raises NotFound, or BadArgument for a layer or range that is not there."""
        found = self._scheduler.sequences.use(sequence)
        self._check_layer(layer)
        length = found.num_computed
        end = length if stop is None else stop
        if not 0 <= start <= end <= length:
            raise BadArgument(f"tokens {start}..{end} were asked for; the sequence has 0..{length}")
        result = self.model.read(layer, found.block_table, start, end)
        return ReadResult(result.k, result.v, result.k_data, result.v_data, length)

    def length(self, sequence: SequenceKey, layer: int) -> int:
        self._check_layer(layer)
        return self._scheduler.sequences.find(sequence).num_computed

    def drop(self, sequence: SequenceKey) -> int:
        """Forget it; returns how many layers it had. Raises NotFound, or Conflict while it is generated."""
        self._scheduler.sequences.delete(sequence)
        return self.model.facts.num_layers

    def pin(self, sequence: SequenceKey, expires_at: float) -> None:
        self._scheduler.sequences.pin(sequence, expires_at)

    def unpin(self, sequence: SequenceKey) -> None:
        self._scheduler.sequences.unpin(sequence)

    def flush(self, tenant: str, cache_salt: str | None) -> int:
        """Forget the prefixes of a tenant, or of one salt of it; returns how many blocks they had."""
        return self._cache.flush(
            lambda seed: seed.tenant == tenant and (cache_salt is None or seed.cache_salt == cache_salt)
        )

    def describe(self, tenant: str, prefix: str, after: str, limit: int, now: float) -> list[SequenceInfo]:
        """A tenant's sequences by id."""
        names = [
            key
            for key in self._scheduler.sequences.names()
            if key.tenant == tenant and key.seq_id > after and key.seq_id.startswith(prefix)
        ]
        return [self._info(key, now) for key in names[:limit]]

    def has_pins(self, now: float) -> bool:
        """Whether a client has pinned one of them, for longer than `now`."""
        sequences = self._scheduler.sequences
        return any(sequences.is_pinned(key, now) for key in sequences.names())

    def leave(self) -> list[EngineEvent]:
        """The model leaves memory, and with it every sequence that anybody was told of and every block."""
        assert not self.is_busy, "a model that still generates cannot leave"
        self.loans.revoke()
        self._cache.flush()
        forgotten = [Forgotten(key) for key in self._names]
        self._names = set()
        return [*forgotten, *self.moves()]

    def name_changes(self) -> list[EngineEvent]:
        """What has become of named sequences since the last call."""
        sequences = self._scheduler.sequences
        stirred = sequences.take_stirred()
        there = set(filter(sequences.has, stirred))
        gone, new = (stirred - there) & self._names, there - self._names
        self._names -= gone
        self._names |= new
        return [*map(Forgotten, gone), *map(Retained, new)]

    # --- blocks that travel ---

    @property
    def loans(self) -> Loans:
        return self._scheduler.sequences.loans

    def fill(
        self,
        loan: LoanId,
        digests: Sequence[BlockHash],
        tokens: Sequence[bytes],
        seed: HashSeed,
        data: bytearray,
        now: float,
    ) -> int:
        """Add blocks with these bytes to a loan; returns how many it holds then. Raises NotFound or NoSpace."""
        write = partial(self.model.write_blocks, data=data)
        return self._scheduler.sequences.fill_loan(loan, digests, tokens, seed, write, now)

    def seed(self, tenant: str, cache_salt: str) -> HashSeed:
        """What names the blocks that this tenant shares with itself."""
        facts = self.model.facts
        return HashSeed(
            model=facts.fingerprint,
            # Keys and values that were rounded otherwise are other ones.
            dtype=facts.dtype if facts.kv_dtype == facts.dtype else f"{facts.dtype}/{facts.kv_dtype}",
            block_size=facts.block_size,
            tenant=tenant,
            cache_salt=cache_salt,
        )

    # --- figures ---

    def moves(self) -> list[EngineEvent]:
        """What has become of its findable blocks, and of the chain nodes that end in them, since the last call."""
        nodes, blocks = self._cache.take_node_changes(), self._cache.take_block_changes()
        return [*([NodesMoved(nodes)] if nodes else []), *([BlocksMoved(blocks)] if blocks else [])]

    def engine_stats(self) -> EngineStats:
        return self._scheduler.engine_stats()

    def pool_stats(self) -> PoolStats:
        audits = self._auditor.counts()
        return msgspec.structs.replace(
            self._scheduler.pool_stats(),
            audits_passed=audits.passed,
            audits_failed=audits.failed,
            audits_skipped=audits.skipped,
        )

    # --- inside ---

    def _task(self, start: Start, prompt: tuple[int, ...]) -> tasks.GenerationTask:
        sampling = start.sampling
        seed = self.seed(start.tenant, start.cache_salt)
        if not self.shares_prefixes:  # a seed of its own makes a request share with nobody, not even under its name
            seed = replace(seed, adapter=start.run.hex())
        return tasks.GenerationTask(
            key=start.run,
            prompt=prompt,
            seed=seed,
            max_tokens=sampling.max_tokens,
            min_tokens=sampling.min_tokens,
            eos_ids=self._eos_ids,
            stop_ids=frozenset(sampling.stop_token_ids),
            ignore_eos=sampling.ignore_eos,
            sequence=SequenceKey(start.tenant, start.seq_id) if start.seq_id else None,
            resume=start.resume,
            deadline=start.deadline,
            priority=start.priority,
            landmarks=self._landmarks(start, len(prompt)) if self.shares_prefixes else (),
            prompt_logprobs=sampling.prompt_logprobs,
        )

    def _landmarks(self, start: Start, num_tokens: int) -> tuple[Landmark, ...]:
        return landmarks(start.chain, start.kind, len(start.prompt), num_tokens, self.model.facts.block_size)

    def _share_time(self, step: tasks.Step, step_s: float) -> list[EngineEvent]:
        """Charge each prefill in a step for its part of the time, by tokens; says which prefills that completes."""
        num_tokens = sum(len(piece.token_ids) for piece in step.batch)
        events: list[EngineEvent] = []
        for key, piece in zip(step.keys, step.batch, strict=True):
            run = RunId(key)
            output = self._outputs[run]
            if output.is_prefilled:
                continue
            output.num_computed += len(piece.token_ids)
            output.compute_s += step_s * len(piece.token_ids) / num_tokens
            if piece.wants_logits:
                output.is_prefilled = True
                length = piece.start + len(piece.token_ids)
                num_cached = max(0, length - output.num_computed)  # one that was preempted computed some tokens twice
                events.append(Prefilled(run, length, num_cached, output.compute_s * 1000))
        return events

    def _draw(self, run: RunId, piece: Slice) -> Draw:
        output = self._outputs[run]
        early = output.num_tokens < output.sampling.min_tokens
        stops = self._eos_ids.union(output.sampling.stop_token_ids) if early else ()
        position = piece.start + len(piece.token_ids)
        return Draw(sampling=output.sampling, position=position, banned_ids=tuple(stops), changes=output.changes)

    def _note(self, run: RunId, drawn: Drawn) -> int:
        """Count a token that was drawn; returns it."""
        output = self._outputs[run]
        output.num_tokens += 1
        output.logprobs = drawn.logprobs
        if output.changes is not None:
            output.changes.add(drawn.token_id)
        return drawn.token_id

    def _scored(self, run: RunId, piece: Slice, scores: tuple[TokenLogprobs, ...]) -> PromptScored:
        num_tokens = len(self._outputs[run].task.prompt)
        return PromptScored(run, num_tokens, piece.start + 1, tuple(piece.targets), scores)

    def _audit(self) -> bool:
        """Make the audit that is due, if one is."""
        audit = self._auditor.begin()
        if audit is None:
            return False
        difference = None
        try:
            self.model.compute([audit.piece], [None])
            difference = self.model.difference(audit.block, audit.scratch)
        except Exception:  # as in a step; here it harms nobody
            log.exception("an audit of model %s could not be made", self.model.facts.name)
        if not self._auditor.end(audit, difference):
            log.critical(
                "ALARM: cached KV of model %s is not what it computes: block %d differs by %.3g, more than %.3g; "
                "all that was computed from its prefix is forgotten",
                self.model.facts.name,
                audit.block,
                difference,
                self.model.facts.kv_tolerance,
            )
        return True

    def _translate(self, events: Sequence[tasks.Event]) -> list[EngineEvent]:
        """The scheduler's events as the engine's."""
        out: list[EngineEvent] = []
        for position, event in enumerate(events):
            run = RunId(event.key)
            match event:
                case tasks.Started():
                    task = self._outputs[run].task
                    self._auditor.note(task.seed, task.prompt, event.cached_tokens)
                    out.append(self._admitted(run, event.prompt_tokens, event.cached_tokens))
                    if task.prompt_logprobs is not None:
                        out.append(PromptScored(run, len(task.prompt), 0, task.prompt[:1], (None,)))
                case tasks.Sampled():
                    follower = events[position + 1] if position + 1 < len(events) else None
                    is_last = isinstance(follower, tasks.Finished) and follower.key == event.key
                    out.append(NewToken(run, event.token_id, self._outputs[run].logprobs, is_last))
                case tasks.Finished():
                    out += self._finished(run, event)
                case tasks.Failed():
                    del self._outputs[run]
                    out.append(Broke(run, event.error))
                case _:
                    assert_never(event)
        return out

    def _admitted(self, run: RunId, prompt_tokens: int, cached_tokens: int) -> EngineEvent:
        self._outputs[run].is_admitted = True
        return Admitted(run, self.model.facts.name, prompt_tokens, cached_tokens)

    def _finished(self, run: RunId, event: tasks.Finished) -> list[EngineEvent]:
        """One that resumes with all its tokens ends without a turn; its client hears where, like any other."""
        usage = event.usage
        is_admitted = self._outputs[run].is_admitted
        begun = [] if is_admitted else [self._admitted(run, usage.prompt_tokens, usage.cached_tokens)]
        del self._outputs[run]
        return [
            *begun,
            Ended(
                run=run,
                finish_reason=event.reason,
                prompt_tokens=usage.prompt_tokens,
                cached_tokens=usage.cached_tokens,
                queue_ms=usage.queued_s * 1000,
                prefill_ms=usage.prefill_s * 1000,
                decode_ms=usage.decode_s * 1000,
            ),
        ]

    def _check_layer(self, layer: int) -> None:
        if layer >= self.model.facts.num_layers:
            raise NotFound(f"layer {layer} is not in 0..{self.model.facts.num_layers - 1} of this model")

    def _info(self, key: SequenceKey, now: float) -> SequenceInfo:
        facts = self.model.facts
        sequence = self._scheduler.sequences.find(key)
        shape = (sequence.num_computed, facts.num_kv_heads, facts.head_dim)
        return SequenceInfo(
            seq_id=key.seq_id,
            kind="computed",
            nbytes=len(sequence.block_table) * facts.block_bytes,
            pinned=self._scheduler.sequences.is_pinned(key, now),
            layers=tuple(
                LayerInfo(layer=layer, length=shape[0], k_shape=shape, v_shape=shape, dtype=facts.dtype)
                for layer in range(facts.num_layers)
            ),
            num_tokens=sequence.num_computed,
        )
