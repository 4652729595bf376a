"""The table of a generation's states."""

from __future__ import annotations

import pytest

from workers.lifecycle import TRANSITIONS, Change, InvalidTransition, State, after

HOLDS_BLOCKS = {State.PREFILL, State.DECODE, State.PAUSED}


def test_every_pair_that_is_not_in_the_table_is_refused() -> None:
    for state in State:
        for change in Change:
            if (state, change) in TRANSITIONS:
                assert after(state, change) is TRANSITIONS[state, change]
            else:
                with pytest.raises(InvalidTransition, match=f"{state.name} cannot {change.name}") as caught:
                    after(state, change)
                assert (caught.value.state, caught.value.change) == (state, change)


def test_blocks_are_gained_by_admission_and_lost_by_preemption_or_the_end() -> None:
    for (state, change), new in TRANSITIONS.items():
        gained, lost = new in HOLDS_BLOCKS - {state}, state in HOLDS_BLOCKS and new not in HOLDS_BLOCKS
        assert (change is Change.ADMIT) == (gained and state not in HOLDS_BLOCKS)
        assert lost == (state in HOLDS_BLOCKS and change in (Change.PREEMPT, Change.END))


def test_every_live_state_can_end_and_the_end_is_final() -> None:
    assert {state for state, change in TRANSITIONS if change is Change.END} == set(State) - {State.FINISHED}
    assert not [state for state, _ in TRANSITIONS if state is State.FINISHED]
