"""The file that a broker records to: opened with it, closed with it, and given up if it cannot be written."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from bus.errors import BadArgument
from bus.wire import Buffer
from kvcache.broker.recorder import Recorder

log = logging.getLogger(__name__)


class Recording:
    """Appends a line for each generation that ended well. A disk that fails ends the recording, never the broker.

    Raises BadArgument if the file cannot be opened for writing.
    """

    def __init__(self, path: Path, now: float) -> None:
        self._recorder = Recorder(secrets.token_bytes(32), now)
        try:
            self._file = path.open("ab")
        except OSError as error:
            raise BadArgument(f"cannot record to {path}: {error.strerror}") from None

    def __enter__(self) -> Recording:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.flush()
        try:
            self._file.close()
        except OSError as failure:  # what was buffered is lost, and flush has said so
            log.debug("the record was not closed cleanly: %s", failure)

    def asked(self, link: bytes, frames: Sequence[Buffer], now: float) -> None:
        self._recorder.asked(link, frames, now)

    def answered(self, link: bytes, frames: Sequence[Buffer]) -> None:
        line = self._recorder.answered(link, frames)
        if line is not None and not self._file.closed:
            self._write(line)

    def flush(self) -> None:
        """What was recorded is in the file."""
        if not self._file.closed:
            try:
                self._file.flush()
            except OSError as error:
                self._give_up(error)

    def _write(self, line: bytes) -> None:
        try:
            self._file.write(line)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        log.warning("recording has ended: %s", error)
        try:
            self._file.close()
        except OSError as failure:
            log.debug("the record was not closed cleanly: %s", failure)
