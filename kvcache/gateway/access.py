"""API keys: who may call, and whose cache is whose.

Keys are random, so one round of SHA-256 is enough at rest (salts and slow hashes protect what people make up). All
are compared, each in constant time, so that timing tells neither a key nor which one nearly matched. What a key's
requests leave in the cache only that key's requests find: its hash goes into the cache salt. Core: no IO.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Sequence
from hashlib import blake2b, sha256

from bus.errors import BadArgument, Unauthenticated

HASH_PREFIX = "sha256:"
MIN_KEY_CHARS = 8
_HASH_CHARS = 64
_SALT_DOMAIN = b"kvcache/api-key"


class Keys:
    """The keys that are known, by their hashes; with none, everybody may call."""

    def __init__(self, hashes: Iterable[bytes] = ()) -> None:
        self._hashes = tuple(dict.fromkeys(hashes))

    def __len__(self) -> int:
        return len(self._hashes)

    def check(self, authorization: str | None) -> bytes:
        """The caller, as the hash of its key; empty where no keys are asked for. Raises Unauthenticated."""
        if not self._hashes:
            return b""
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise Unauthenticated("this server needs an API key: Authorization: Bearer KEY")
        offered = sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        known = [mine for mine in self._hashes if hmac.compare_digest(mine, offered)]
        if not known:
            raise Unauthenticated("this API key is not known")
        return known[0]


def hash_key(key: str) -> str:
    """A key as it is kept in a file."""
    return HASH_PREFIX + sha256(key.encode()).hexdigest()


def read_keys(keys: Sequence[str], lines: Iterable[str]) -> Keys:
    """From keys as they are, and a file's lines, where `#` begins a comment. Raises BadArgument, naming the line."""
    hashes = [_digest("an API key", key) for key in keys]
    for number, line in enumerate(lines, 1):
        entry = line.partition("#")[0].strip()
        if entry:
            hashes.append(_digest(f"line {number} of the API key file", entry))
    return Keys(hashes)


def isolation_salt(caller: bytes, cache_salt: str | None) -> str | None:
    """The salt on the bus for a caller's `cache_salt`: nobody can name one that another caller's requests have."""
    if not caller:
        return cache_salt
    digest = blake2b(caller, digest_size=24, person=_SALT_DOMAIN)
    digest.update((cache_salt or "").encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _digest(what: str, entry: str) -> bytes:
    if entry.startswith(HASH_PREFIX):
        try:
            digest = bytes.fromhex(entry.removeprefix(HASH_PREFIX))
        except ValueError:
            digest = b""
        if len(digest) * 2 != _HASH_CHARS:
            raise BadArgument(f"{what} is no hash: {HASH_PREFIX} and {_HASH_CHARS} hex digits are needed")
        return digest
    if len(entry) < MIN_KEY_CHARS:
        raise BadArgument(f"{what} has {len(entry)} characters; at least {MIN_KEY_CHARS} are needed")
    return sha256(entry.encode()).digest()
