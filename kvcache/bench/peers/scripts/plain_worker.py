"""The plain microservice way, third service: a model and a dictionary of tensors.

Run as `plain_worker.py PORT MODEL_FOLDER THREADS DTYPE`. A request computes its prompt, keeps its keys and values while
it runs, and forgets them; requests take turns by the step, so none waits for another's end. Nothing is batched.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import plain_wire as wire
import torch
import transformers
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

Tensor = np.ndarray[Any, Any]


class Generator:
    """transformers' model, one forward pass at a time."""

    def __init__(self, folder: str, threads: int, dtype: str) -> None:
        torch.set_num_threads(threads)
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
        self._turn = threading.Lock()

    def lines(self, prompt: Tensor, max_tokens: int, ignore_eos: bool) -> Iterator[bytes]:
        """One line of JSON for each token, greedily chosen."""
        cache = transformers.DynamicCache(config=self._model.config)
        ids = torch.from_numpy(prompt.copy())
        for number in range(1, max_tokens + 1):
            token = self._step(ids, cache)
            is_end = not ignore_eos and token == self._model.config.eos_token_id
            reason = "stop" if is_end else "length" if number == max_tokens else None
            yield wire.dumps({"token": token, "text": self._tokenizer.decode([token]), "finish_reason": reason}) + b"\n"
            if reason:
                return
            ids = torch.tensor([[token]])

    def _step(self, ids: torch.Tensor, cache: Any) -> int:  # noqa: ANN401 (transformers' cache)
        """ids: [1, num_tokens] int64; their keys and values are added to `cache`."""
        with self._turn, torch.inference_mode():
            logits = self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            return int(logits[0, -1].argmax())


class Tensors:
    """K and V by sequence and layer, each [num_tokens, num_kv_heads, head_dim]."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
        self._turn = threading.Lock()

    def put(self, key: tuple[str, int], body: dict[str, Any], *, adds: bool) -> int:
        """Store, or add to the end of what is there; returns how many tokens there are. Raises KeyError, ValueError."""
        k, v = wire.decode(body["k"]), wire.decode(body["v"])
        with self._turn:
            if adds:
                k, v = (np.concatenate(pair) for pair in zip(self._kept[key], (k, v), strict=True))
            self._kept[key] = (k, v)
            return len(k)

    def get(self, key: tuple[str, int]) -> bytes:
        k, v = self._kept[key]
        return wire.dumps({"k": wire.encode(k), "v": wire.encode(v)})


def make_app(generator: Generator) -> Starlette:
    kept = Tensors()

    async def generate(request: Request) -> Response:
        given = await request.json()
        prompt = wire.decode(given["input_ids"])
        return StreamingResponse(generator.lines(prompt, given["max_tokens"], given["ignore_eos"]))

    async def tensors(request: Request) -> Response:
        key = (request.path_params["seq_id"], request.path_params["layer"])
        try:
            if request.method == "GET":
                return Response(await run_in_threadpool(kept.get, key), media_type="application/json")
            body = await request.json()
            length = await run_in_threadpool(kept.put, key, body, adds=request.method == "POST")
        except (ValueError, TypeError) as error:
            return JSONResponse({"error": str(error)}, 400)
        except KeyError as error:
            return JSONResponse({"error": f"there is no {error}"}, 404)
        return JSONResponse({"length": length})

    return Starlette(
        routes=[
            Route("/generate", generate, methods=["POST"]),
            Route("/kv/{seq_id}/{layer:int}", tensors, methods=["PUT", "POST", "GET"]),
        ]
    )


if __name__ == "__main__":
    port, folder, threads, dtype = sys.argv[1:]
    app = make_app(Generator(folder, int(threads), dtype))
    uvicorn.run(app, host="127.0.0.1", port=int(port), log_level="error", access_log=False)
