"""A worker's models in a few words: what each is doing, and how far that is."""

from __future__ import annotations

from bus.stats import ModelStats, WorkerView


def describe_models(view: WorkerView) -> str:
    """As `smollm2 ready, other loading (checking weights 40%)`; what nobody asked for yet is left out if others are."""
    known = {model.name: model for model in view.stats.models} if view.stats is not None else {}
    active = [(name, state) for name, state in view.models if state != "absent"] or list(view.models)
    return ", ".join(f"{name} {state}{_detail(known.get(name), state)}" for name, state in active)


def _detail(model: ModelStats | None, state: str) -> str:
    """What is being done to it; a status may be older than a beat, and then it says nothing."""
    if model is None or model.state != state or not model.stage:
        return ""
    return f" ({model.stage} {model.progress:.0%})" if model.progress else f" ({model.stage})"
