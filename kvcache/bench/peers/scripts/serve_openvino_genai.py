"""OpenVINO GenAI's continuous batching behind the least HTTP that streams: OpenAI's completions of token ids.

Run as `serve_openvino_genai.py PORT MODEL_FOLDER THREADS DTYPE`; reads the float16 GGUF of the model. One thread steps
the pipeline while there is work; a thread for each connection takes what came for it after each step.
"""

from __future__ import annotations

import itertools
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import openvino as ov
import openvino_genai as genai
from genai_settings import properties, scheduling

CACHE_GB = 1


class Pipeline:
    """Shared by all connections; `_turn` guards the pipeline and tells of each step."""

    def __init__(self, folder: str, threads: int, dtype: str) -> None:
        settings = properties(threads, dtype)
        self._pipeline = genai.ContinuousBatchingPipeline(
            f"{folder}/float16.gguf", scheduling(CACHE_GB), "CPU", settings
        )
        self._tokenizer = self._pipeline.get_tokenizer()
        self._turn = threading.Condition()
        self._arrived: list[tuple[genai.GenerationConfig, ov.Tensor, list[genai.GenerationHandle]]] = []
        self._numbers = itertools.count()

    def work(self) -> None:
        """Step for ever. New requests join between steps, so that none waits for the lock while a step runs."""
        while True:
            with self._turn:
                self._turn.wait_for(lambda: self._arrived or self._pipeline.has_non_finished_requests())
                for config, ids, handle in self._arrived:
                    handle.append(self._pipeline.add_request(next(self._numbers), ids, config))
                self._arrived.clear()
            self._pipeline.step()
            with self._turn:
                self._turn.notify_all()

    def tokens(self, prompt: list[int], max_tokens: int, ignore_eos: bool) -> Iterator[tuple[str, bool]]:
        """(text, whether it is the last) of each token, as it comes."""
        config = genai.GenerationConfig(max_new_tokens=max_tokens, do_sample=False, ignore_eos=ignore_eos)
        handles: list[genai.GenerationHandle] = []
        with self._turn:
            self._arrived.append((config, ov.Tensor(np.array([prompt], dtype=np.int64)), handles))
            self._turn.notify_all()
        is_last = False
        while not is_last:
            with self._turn:
                self._turn.wait_for(lambda: handles and handles[0].can_read())
                (output,) = handles[0].read().values()
            is_last = output.finish_reason != genai.GenerationFinishReason.NONE
            yield self._tokenizer.decode(output.generated_ids), is_last


def make_handler(pipeline: Pipeline) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            given = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            for text, is_last in pipeline.tokens(given["prompt"], given["max_tokens"], given["ignore_eos"]):
                choice = {"index": 0, "text": text, "finish_reason": "length" if is_last else None}
                self.wfile.write(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n")
            self.wfile.write(b"data: [DONE]\n\n")

        def log_message(self, format: str, *args: object) -> None:
            """Requests are not worth a line each."""

    return Handler


if __name__ == "__main__":
    port, folder, threads, dtype = sys.argv[1:]
    shared = Pipeline(folder, int(threads), dtype)
    threading.Thread(target=shared.work, daemon=True).start()
    ThreadingHTTPServer(("127.0.0.1", int(port)), make_handler(shared)).serve_forever()
