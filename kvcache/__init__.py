"""Placement and the faces people use: broker, client, CLI. Importing this never imports torch.

The public names are loaded when they are first asked for, so that `import kvcache` costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bus.errors import (
        BadArgument,
        BadTensor,
        Cancelled,
        Conflict,
        ConnectionLost,
        DeadlineExceeded,
        KVCacheError,
        ModelNotFound,
        ModelUnavailable,
        NoSpace,
        NotFound,
        NoWorkers,
        Overloaded,
        StreamGap,
        TooLarge,
        WorkerLost,
    )
    from bus.stats import (
        ClusterStats,
        Explanation,
        SequenceInfo,
        WorkerView,
    )
    from kvcache.client import (
        Alternative,
        AsyncClient,
        AsyncGeneration,
        Client,
        Done,
        Event,
        Generation,
        KvAck,
        KVPair,
        PromptTokens,
        Start,
        Timings,
        Token,
        Usage,
    )
    from kvcache.sampling import (
        SamplingParams,
    )

__all__ = [
    "Alternative",
    "AsyncClient",
    "AsyncGeneration",
    "BadArgument",
    "BadTensor",
    "Cancelled",
    "Client",
    "ClusterStats",
    "Conflict",
    "ConnectionLost",
    "DeadlineExceeded",
    "Done",
    "Event",
    "Explanation",
    "Generation",
    "KVCacheError",
    "KVPair",
    "KvAck",
    "ModelNotFound",
    "ModelUnavailable",
    "NoSpace",
    "NoWorkers",
    "NotFound",
    "Overloaded",
    "PromptTokens",
    "SamplingParams",
    "SequenceInfo",
    "Start",
    "StreamGap",
    "Timings",
    "Token",
    "TooLarge",
    "Usage",
    "WorkerLost",
    "WorkerView",
]

_HOMES = {
    "bus.stats": ("ClusterStats", "Explanation", "SequenceInfo", "WorkerView"),
    "kvcache.sampling": ("SamplingParams",),
    "kvcache.client": (
        *("AsyncClient", "AsyncGeneration", "Client", "Generation", "KVPair", "KvAck"),
        *("Alternative", "Done", "Event", "PromptTokens", "Start", "Timings", "Token", "Usage"),
    ),
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'kvcache' has no attribute {name!r}")
    home = next((home for home, names in _HOMES.items() if name in names), "bus.errors")
    return getattr(import_module(home), name)
