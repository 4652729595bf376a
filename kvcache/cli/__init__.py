"""The `kvcache` command."""

from kvcache.cli.app import main

__all__ = ["main"]
