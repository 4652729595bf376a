"""`kvcache models`: which models this machine has, and fetching one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

from kvcache.cli.options import AsJson, Home
from kvcache.cli.output import console, human_bytes, note, print_json, print_table
from kvcache.models import DEFAULT_HOME, ModelRegistry, ModelSource, with_revision
from kvcache.pull import PullProgress
from kvcache.pull import pull as pull_model


def pull(
    name: Annotated[
        str,
        typer.Argument(
            help="A name from `kvcache models list`, a hub id such as org/name, org/name@revision or "
            "org/name/file.gguf, or a .gguf file."
        ),
    ],
    revision: Annotated[
        str | None,
        typer.Option(
            "--revision", help="Of a hub id: the same as org/name@REVISION.", show_default=False, metavar="REV"
        ),
    ] = None,
    home: Home = str(DEFAULT_HOME),
) -> None:
    """Fetch a model, check it and keep it as safetensors.

    Does nothing if it is here already. A model with a revision answers to its whole name, revision included.
    """
    registry = ModelRegistry(Path(home), named=[name if revision is None else with_revision(name, revision)])
    source = fetch(registry, registry.named[0])
    note(f"{source.name} is ready: {source.path}")


def fetch(registry: ModelRegistry, name: str) -> ModelSource:
    """The model, pulled unless it is here; on stderr a progress bar, or a line for each stage if it is no terminal."""
    source = registry.find(name)
    if source.is_present:
        return source
    terminal = console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=terminal, disable=not terminal.is_terminal) as progress:
        bar = progress.add_task("starting", total=None)
        told: set[str] = set()

        def report(step: PullProgress) -> None:
            progress.update(bar, description=step.stage, completed=step.done, total=step.total or None)
            if progress.disable and step.stage not in told:
                told.add(step.stage)
                note(f"{name}: {step.stage}")

        return pull_model(registry, name, report)


def list_(home: Home = str(DEFAULT_HOME), as_json: AsJson = False) -> None:
    """Models that can be served here, and those that can be fetched."""
    models = ModelRegistry(Path(home)).list_models()
    if as_json:
        print_json([_plain(model) for model in models])
        return
    rows = [
        (model.name, model.kind.value, human_bytes(_size(model)) if model.is_present else "not fetched", model.path)
        for model in models
    ]
    print_table(["NAME", "KIND", "#SIZE", "PATH"], rows)


def _plain(model: ModelSource) -> dict[str, object]:
    return {
        "name": model.name,
        "kind": model.kind.value,
        "path": str(model.path),
        "present": model.is_present,
        "bytes": _size(model) if model.is_present else 0,
    }


def _size(model: ModelSource) -> int:
    return sum(file.stat().st_size for file in model.path.iterdir() if file.is_file())
