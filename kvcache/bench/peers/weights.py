"""A model's weights as GGUF files, for the peers that read those."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from kvcache.bench.peers.environments import PeerUnavailable


def gguf_folder(folder: Path, home: Path, dtype: str, progress: Callable[[str], None]) -> Path:
    """Where the weights lie as `float16.gguf` and in `dtype`, written on first use. Raises PeerUnavailable."""
    target = home / "bench" / "models" / folder.name
    target.mkdir(parents=True, exist_ok=True)
    for name in {"float16", dtype}:
        file = target / f"{name}.gguf"
        if not file.exists():
            progress(f"writing {file.name}")
            command = [sys.executable, "-m", "workers.gguf_file", str(folder), str(file), name]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise PeerUnavailable(f"the GGUF file cannot be written: {done.stderr.strip().splitlines()[-1]}")
    return target
