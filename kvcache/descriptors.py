"""How many connections a process may have: each is a file descriptor, and the usual soft limit is 1024."""

from __future__ import annotations

import resource

WANTED = 65_536


def allow_many() -> None:
    """Raise our own soft limit, as far as the hard one lets us."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED if hard == resource.RLIM_INFINITY else min(hard, WANTED)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
