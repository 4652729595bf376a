"""The table of a model's states."""

from __future__ import annotations

import pytest

from bus.messages import ModelState
from workers.model_states import AS_TOLD, TRANSITIONS, InvalidTurn, Phase, Turn, after

HAS_MEMORY = {Phase.LOADING, Phase.READY, Phase.LEAVING}


def test_every_pair_that_is_not_in_the_table_is_refused() -> None:
    for phase in Phase:
        for turn in Turn:
            if (phase, turn) in TRANSITIONS:
                assert after(phase, turn) is TRANSITIONS[phase, turn]
            else:
                with pytest.raises(InvalidTurn, match=f"{phase.name} cannot {turn.name}") as caught:
                    after(phase, turn)
                assert (caught.value.phase, caught.value.turn) == (phase, turn)


def test_memory_is_gained_by_a_grant_and_lost_by_failing_or_leaving() -> None:
    for (phase, turn), new in TRANSITIONS.items():
        assert (turn is Turn.GRANT) == (phase not in HAS_MEMORY and new in HAS_MEMORY)
        assert (phase in HAS_MEMORY and turn in (Turn.FAIL, Turn.UNLOAD)) == (
            phase in HAS_MEMORY and new not in HAS_MEMORY
        )


def test_whatever_serves_is_told_as_ready_and_every_phase_is_told_as_something() -> None:
    assert set(AS_TOLD) == set(Phase)
    assert {phase for phase, told in AS_TOLD.items() if told is ModelState.READY} == {Phase.READY, Phase.LEAVING}
