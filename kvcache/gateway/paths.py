"""Which path a caller means: base addresses are typed with and without `/v1`, and with a slash too many. Core.

Answered directly: a redirect, which not every client follows with its body, would name the scheme and the host that
this process sees and not the proxy's before it.
"""

from __future__ import annotations

import re

_SLASHES = re.compile("/+")
_API = re.compile(r"/(v1|chat/completions|completions|models|tokenize|detokenize|health|ready|version|metrics)(/|$)")
_UNVERSIONED = re.compile(r"/(chat/completions|completions|models(/.*)?)")


def canonical(path: str) -> str:
    """The path under which the API serves this one; all others as they are, the dashboard's above all.

    `/chat/completions`, `/completions` and `/models` are those under `/v1`, for a base address that was given without.
    """
    tidy = _SLASHES.sub("/", path).rstrip("/")
    if not _API.match(tidy):
        return path
    return f"/v1{tidy}" if _UNVERSIONED.fullmatch(tidy) else tidy
