"""Benchmarks, each against its reference in the same run: `kvcache bench NAME`."""
