"""Replays traces of requests through the broker's own routing code, against workers that are only modelled."""
