"""The topic of a token stream: 18 bytes, of which 16 are random.

A SUB filter is a prefix match, so every topic has the same length and the broker approves a
subscription only if it is exactly the topic of a stream that it opened.
"""

from __future__ import annotations

TOPIC_BYTES = 18
_HEAD = b"S|"


def topic_of(stream_id: bytes) -> bytes:
    """The topic that carries the stream with this 16-byte id."""
    return _HEAD + stream_id


def stream_of(topic: bytes) -> bytes | None:
    """The stream id in a topic; None if it is not the topic of any stream."""
    if len(topic) != TOPIC_BYTES or not topic.startswith(_HEAD):
        return None
    return topic[len(_HEAD) :]
