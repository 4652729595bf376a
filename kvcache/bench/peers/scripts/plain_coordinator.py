"""The plain microservice way, second service: who serves an id. Run as `plain_coordinator.py PORT WORKER...`."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route


def make_app(workers: Sequence[str]) -> Starlette:
    """An id always has the same worker; ids are spread evenly."""

    async def assign(request: Request) -> JSONResponse:
        digest = hashlib.sha256(str((await request.json())["id"]).encode()).digest()
        return JSONResponse({"worker": workers[int.from_bytes(digest[:8], "big") % len(workers)]})

    return Starlette(routes=[Route("/assign", assign, methods=["POST"])])


if __name__ == "__main__":
    uvicorn.run(make_app(sys.argv[2:]), host="127.0.0.1", port=int(sys.argv[1]), log_level="error", access_log=False)
