"""The client library. It never loads torch, unless it is handed a tensor or asked for one."""

from typing import TYPE_CHECKING

from kvcache.client.aio import AsyncClient
from kvcache.client.arrays import KVPair
from kvcache.client.generation import AsyncGeneration
from kvcache.client.kv import AsyncKV
from kvcache.client.results import Alternative, Done, Event, KvAck, PromptTokens, Start, Timings, Token, Usage
from kvcache.client.sync import KV, Client, Generation

if TYPE_CHECKING:
    from kvcache.client.arrays import Array as Array

__all__ = [
    "KV",
    "Alternative",
    "AsyncClient",
    "AsyncGeneration",
    "AsyncKV",
    "Client",
    "Done",
    "Event",
    "Generation",
    "KVPair",
    "KvAck",
    "PromptTokens",
    "Start",
    "Timings",
    "Token",
    "Usage",
]
