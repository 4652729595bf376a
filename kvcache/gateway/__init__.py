"""The OpenAI-compatible HTTP gateway: an ordinary client of the bus, of which several may run."""
