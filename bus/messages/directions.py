"""Who hears what: one closed union of messages for each direction."""

from __future__ import annotations

from bus.messages.asking import Query, QueryReply, Route, Routed
from bus.messages.calls import Assign, Failed, Forward, Prefilled, Relay, Release, Reply
from bus.messages.copying import (
    BlocksFound,
    CopySequence,
    Grant,
    HandedOver,
    PullBlocks,
    PullSequence,
    SequenceCopied,
    SequenceFound,
)
from bus.messages.generating import (
    Ack,
    Cancel,
    Detokenize,
    Detokenized,
    Generate,
    OpenStream,
    PromptLogprobs,
    Replay,
    Resume,
    Started,
    StreamEnd,
    StreamOpened,
    Tokenize,
    Tokenized,
)
from bus.messages.holding import AskNodes, DropSequences, NodesChanged, NodesHeld, ReleaseSequence, WorkerSequences
from bus.messages.joining import (
    AttachBulk,
    Beat,
    BrokerBeat,
    Goodbye,
    Hello,
    Welcome,
    WorkerBeat,
    WorkerHello,
    WorkerStatus,
)
from bus.messages.kv import (
    Append,
    Chunk,
    Credit,
    Delete,
    FlushPrefixCache,
    Get,
    KvDone,
    KvListed,
    KvValue,
    Length,
    ListSequences,
    Pin,
    Put,
    Unpin,
)
from bus.messages.streams import StreamBeat, StreamTokens, SubAck

Dispatched = (
    Generate
    | Tokenize
    | Detokenize
    | Put
    | Append
    | Get
    | Length
    | Delete
    | Pin
    | Unpin
    | ListSequences
    | FlushPrefixCache
)
"""Requests that the broker hands to a worker."""

FollowUp = Cancel | Resume | Ack | Credit | Chunk
"""What a client says within a request that was dispatched."""

ToBroker = Hello | AttachBulk | Beat | Goodbye | OpenStream | Query | Route | Dispatched | FollowUp
WorkerToBroker = (
    WorkerHello
    | AttachBulk
    | WorkerBeat
    | WorkerStatus
    | NodesChanged
    | NodesHeld
    | WorkerSequences
    | SequenceCopied
    | Goodbye
    | Reply
    | Relay
    | Prefilled
)
ToWorker = (
    Welcome
    | BrokerBeat
    | AskNodes
    | Goodbye
    | DropSequences
    | ReleaseSequence
    | CopySequence
    | HandedOver
    | Assign
    | Forward
    | Relay
    | Release
    | Grant
    | Failed
)
ToHolder = PullBlocks | PullSequence | Credit | Cancel
"""What a worker hears from another that copies from it."""

ToPuller = BlocksFound | SequenceFound | Chunk | Failed
"""What a worker hears from another that it copies from."""

ToClient = (
    Welcome
    | BrokerBeat
    | Goodbye
    | QueryReply
    | Routed
    | StreamOpened
    | Started
    | PromptLogprobs
    | Replay
    | StreamEnd
    | Tokenized
    | Detokenized
    | KvDone
    | KvValue
    | KvListed
    | Credit
    | Chunk
    | Failed
)
OnStream = SubAck | StreamTokens | StreamBeat
