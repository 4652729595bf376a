"""The protocol: typed messages, frames, liveness and stream sequencing; zmq in `sockets` only."""
