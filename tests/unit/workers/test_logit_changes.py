"""What penalties and biases touch, counted token by token."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus.messages import Sampling
from workers.logit_changes import LogitChanges, changes_of

VOCAB = 400
tokens = st.lists(st.integers(0, VOCAB - 1), max_size=200)
penalties = st.fixed_dictionaries(
    {
        "repetition_penalty": st.sampled_from([0.5, 1.0, 1.7]),
        "presence_penalty": st.sampled_from([-1.0, 0.0, 0.25]),
        "frequency_penalty": st.sampled_from([-0.5, 0.0, 2.0]),
        "logit_bias": st.sampled_from([(), ((3, 4.0), (399, -100.0))]),
    }
)


def changed(changes: LogitChanges | None, logits: np.ndarray) -> np.ndarray:
    out = logits.copy()
    if changes is not None:
        out[changes.token_ids] = changes.apply(logits[changes.token_ids])
    return out


def slow(sampling: Sampling, prompt: list[int], outputs: list[int], logits: np.ndarray) -> np.ndarray:
    """One token after the other, by the book."""
    out = logits.copy()
    biases = dict(sampling.logit_bias)
    for token in range(VOCAB):
        x = out[token] + np.float32(biases.get(token, 0.0))
        if token in prompt or token in outputs:
            factor = np.float32(sampling.repetition_penalty)
            x = x / factor if x > 0 else x * factor
        x -= np.float32(sampling.frequency_penalty) * np.float32(outputs.count(token))
        x -= np.float32(sampling.presence_penalty) * np.float32(token in outputs)
        out[token] = x
    return out


@given(tokens, tokens, penalties, st.integers(0, 200))
def test_counting_on_is_counting_again(
    prompt: list[int], outputs: list[int], parameters: dict[str, float], cut: int
) -> None:
    """Wherever a stream was cut and went on elsewhere, its logits change as if it had never been."""
    sampling = Sampling(**parameters)  # type: ignore[arg-type]
    logits = np.linspace(-5, 5, VOCAB, dtype=np.float32)
    resumed = changes_of(sampling, prompt, outputs[:cut])
    if resumed is not None:
        for token in outputs[cut:]:
            resumed.add(token)
    np.testing.assert_allclose(changed(resumed, logits), slow(sampling, prompt, outputs, logits), rtol=1e-6)
    again = changes_of(sampling, prompt, outputs)
    assert (changed(again, logits) == changed(resumed, logits)).all()


def test_parameters_that_change_nothing_cost_nothing() -> None:
    assert changes_of(Sampling(temperature=0.3, top_k=4), [1, 2], [3]) is None


@pytest.mark.parametrize("parameters", [{"presence_penalty": 1.0}, {"frequency_penalty": 1.0}])
def test_presence_and_frequency_do_not_look_at_the_prompt(parameters: dict[str, float]) -> None:
    changes = changes_of(Sampling(**parameters), [1, 2, 3], [4])  # type: ignore[arg-type]
    assert changes is not None
    assert changes.token_ids.tolist() == [4]


def test_a_bias_alone_counts_no_tokens() -> None:
    changes = changes_of(Sampling(logit_bias=((7, 1.0),)), [1, 2], [3])
    assert changes is not None
    changes.add(5)
    assert changes.token_ids.tolist() == [7]
