"""The plain microservice way, first service: what users talk to. Run as `plain_gateway.py PORT COORDINATOR`.

It gives each request a random id, asks the coordinator who serves that id, and passes on what the worker says. So
requests that begin alike meet on one worker only by chance, and the worker would not look for it.

On Starlette, which FastAPI is a layer on: without that layer's models it is, if anything, a little quicker.
"""

from __future__ import annotations

import json
import sys
import uuid
from collections.abc import Iterator

import numpy as np
import plain_wire as wire
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route


def make_app(coordinator: str, connections: wire.Connections) -> Starlette:
    """OpenAI's streamed completions of token ids, and tensors by sequence and layer."""

    def place_of(name: str) -> str:
        status, body = connections.call(coordinator, "POST", "/assign", wire.dumps({"id": name}))
        if status != 200:
            raise ConnectionError(f"the coordinator answered {status}")
        return str(json.loads(body)["worker"])

    async def complete(request: Request) -> Response:
        try:
            given = await request.json()
            order = {
                "id": str(uuid.uuid4()),
                "input_ids": wire.encode(np.array([given["prompt"]], dtype=np.int64)),
                "max_tokens": int(given["max_tokens"]),
                "ignore_eos": bool(given.get("ignore_eos", False)),
            }
        except (ValueError, KeyError, TypeError) as error:
            return JSONResponse({"error": {"message": f"not a request: {error!r}"}}, 400)
        place = await run_in_threadpool(place_of, order["id"])
        return StreamingResponse(_events(place, wire.dumps(order)), media_type="text/event-stream")

    async def tensors(request: Request) -> Response:
        seq_id = request.path_params["seq_id"]
        body = await request.body()
        place = await run_in_threadpool(place_of, seq_id)
        status, answer = await run_in_threadpool(connections.call, place, request.method, request.url.path, body)
        return Response(answer, status, media_type="application/json")

    return Starlette(
        routes=[
            Route("/v1/completions", complete, methods=["POST"]),
            Route("/kv/{seq_id}/{layer:int}", tensors, methods=["PUT", "POST", "GET"]),
        ]
    )


def _events(place: str, order: bytes) -> Iterator[bytes]:
    """The worker's lines as server-sent events."""
    connection = wire.connect(place)
    try:
        connection.request("POST", "/generate", order, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            yield b"data: " + wire.dumps({"error": {"message": f"the worker answered {answer.status}"}}) + b"\n\n"
            return
        while line := answer.readline():
            token = json.loads(line)
            choice = {"index": 0, "text": token["text"], "finish_reason": token["finish_reason"]}
            yield b"data: " + wire.dumps({"object": "text_completion", "choices": [choice]}) + b"\n\n"
        yield b"data: [DONE]\n\n"
    finally:
        connection.close()


if __name__ == "__main__":
    app = make_app(sys.argv[2], wire.Connections())
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="error", access_log=False)
