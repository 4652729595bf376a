"""The files that a loaded model's weights came from: whether they still are what was fingerprinted, and ours.

transformers maps what needs no conversion: such weights are pages of the file, read when they are first used, and
whoever writes into that file writes into them. Blocks are shared under a fingerprint of the bytes, so weights must be
those bytes for as long as they are computed with.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bus.errors import ModelUnavailable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

Stamp = tuple[int, int, int]


class WeightFiles:
    """Make it before the files are read. are_mapped: whether weights are pages of theirs, as who reads them says."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.are_mapped = False
        self._stamps = {file: _stamp(file) for file in files}

    def check(self) -> None:
        """Raise ModelUnavailable if a file is not the one that was there, or was written to."""
        for file, stamp in self._stamps.items():
            if _stamp(file) != stamp:
                raise ModelUnavailable(f"{file.name} was changed while the model was loaded; it will be read anew")

    def take(self, model: nn.Module) -> None:
        """Copy weights that are pages of a file into memory of our own; does so once. Raises as `check`."""
        if self.are_mapped:
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.data = tensor.data.clone()
            self.are_mapped = False
            self.check()


def _stamp(file: Path) -> Stamp:
    """Of the inode, so that a file renamed into its place is another. Raises ModelUnavailable if there is none."""
    try:
        stat = file.stat()
    except OSError as error:
        raise ModelUnavailable(f"{file.name} cannot be read: {error.strerror}") from error
    return stat.st_ino, stat.st_size, stat.st_mtime_ns
