"""ZeroMQ, all of it: nothing else imports zmq.

A `Socket` is a plain zmq socket drained on its file descriptor by the running event loop, one reader
and one writer in one thread. It hands each drained batch to a callback at once, as an asyncio protocol
does; awaiting message by message costs four times as much (docs/PROTOCOL.md). What the callback may
rely on, and why the code is as it is:

- nothing is ever cancelled inside a receive, so no message is lost to a timeout;
- sends never block: what libzmq will not take now waits in a queue of ours, bounded per peer, in order;
  when that is full the send reports `Sent.FULL` and the message is not sent: the caller decides;
- a ROUTER is always MANDATORY: a peer that is gone is reported (`Sent.GONE`), never a silent hole;
- the descriptor is edge-triggered and a send can swallow the edge, so events are looked at again after
  every batch and after every send.
"""

from bus.sockets.lanes import BULK, CONTROL, KV_EVENTS, SUBSCRIPTIONS, TOKENS, Lane, Sent
from bus.sockets.libzmq import Context
from bus.sockets.peers import Dealer, Router
from bus.sockets.pubsub import Publisher, StreamHub, Subscriber
from bus.sockets.socket import Message, OnBatch, Socket

__all__ = [
    "BULK",
    "CONTROL",
    "KV_EVENTS",
    "SUBSCRIPTIONS",
    "TOKENS",
    "Context",
    "Dealer",
    "Lane",
    "Message",
    "OnBatch",
    "Publisher",
    "Router",
    "Sent",
    "Socket",
    "StreamHub",
    "Subscriber",
]
