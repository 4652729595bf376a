"""The worker process: a model, its block pool and prefix cache, and the KV plane; the only home of torch."""
