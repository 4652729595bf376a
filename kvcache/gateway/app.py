"""The routes, joined to what serves them."""

from __future__ import annotations

import asyncio
import time
from importlib.metadata import version
from typing import TYPE_CHECKING

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.routing import Route

from bus.errors import Overloaded
from kvcache.client import AsyncClient
from kvcache.gateway import openapi
from kvcache.gateway.access import Keys
from kvcache.gateway.asks import Ask, chat_ask, chat_prompt, completion_ask
from kvcache.gateway.bodies import S, read
from kvcache.gateway.config import GatewayConfig
from kvcache.gateway.dashboard import Dashboard
from kvcache.gateway.gate import OPEN_PATHS, Gate, http_error
from kvcache.gateway.generating import Answer
from kvcache.gateway.measuring import Answers, Measures
from kvcache.gateway.problems import Problem
from kvcache.gateway.queries import Queries
from kvcache.gateway.replies import Detokenized, ModelList, Status, Tokenized, Version
from kvcache.gateway.schema import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from kvcache.gateway.shapes import ChatShape, CompletionShape, Shape
from kvcache.gateway.slowest import Slowest
from kvcache.gateway.vocabulary import Vocabulary
from kvcache.gateway.watch import Watch
from kvcache.metrics.latest import LatestStats
from kvcache.tracing import Tracer

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import Receive, Scope, Send

METRICS_PATH = "/metrics"


class Gateway:
    """The handlers; each returns a response, or raises a Problem or an error of the bus."""

    def __init__(self, config: GatewayConfig, client: AsyncClient, answers: Answers) -> None:
        self._config = config
        self._client = client
        self._queries = Queries(client, config, int(time.time()))
        self._vocabulary = Vocabulary(client)
        self._num_answers = 0
        self.slowest = Slowest()
        self.latest = LatestStats(client.stats)
        self.measures = Measures(self.latest, answers, is_vllm_compatible=config.metrics_compat == "vllm")

    def routes(self) -> list[Route]:
        return [
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat_completions, methods=["POST"]),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
            Route("/health", self.health),
            Route("/ready", self.ready),
            Route("/version", self.version),
            Route("/server_info", self.server_info),
            Route(METRICS_PATH, self.metrics),
            Route("/openapi.json", self.openapi),
        ]

    async def completions(self, request: Request) -> Response:
        body = await self._read(request, CompletionRequest)
        return self._answer(completion_ask(body, request.state.caller), CompletionShape())

    async def chat_completions(self, request: Request) -> Response:
        body = await self._read(request, ChatRequest)
        return self._answer(chat_ask(body, request.state.caller, self._config.default_max_tokens), ChatShape())

    async def models(self, request: Request) -> Response:
        return _json(ModelList(data=await self._queries.models()))

    async def model(self, request: Request) -> Response:
        return _json(await self._queries.model(request.path_params["name"]))

    async def tokenize(self, request: Request) -> Response:
        body = await self._read(request, TokenizeRequest)
        if (body.prompt is None) == (body.messages is None):
            raise Problem(400, "give exactly one of prompt and messages", param="prompt")
        arguments = {"prompt": body.prompt} if body.messages is None else chat_prompt(body.messages, body.tools)
        special = body.add_special_tokens is not False
        found = await self._client.tokenize(**arguments, model=body.model or None, special=special)
        return _json(
            Tokenized(count=len(found.token_ids), max_model_len=found.max_model_len, tokens=list(found.token_ids))
        )

    async def detokenize(self, request: Request) -> Response:
        body = await self._read(request, DetokenizeRequest)
        return _json(Detokenized(prompt=await self._client.detokenize(body.tokens, model=body.model or None)))

    async def health(self, request: Request) -> Response:
        if not await self._queries.is_healthy():
            raise Problem(503, "no worker answers", "server_error", retry_after_s=1)
        return _json(Status(status="ok"))

    async def ready(self, request: Request) -> Response:
        if not await self._queries.is_ready():
            raise Problem(503, "no worker has a model loaded", "server_error", retry_after_s=1)
        return _json(Status(status="ready"))

    async def version(self, request: Request) -> Response:
        return _json(Version(version=version("kvcache")))

    async def server_info(self, request: Request) -> Response:
        return _json(await self._queries.server_info())

    async def metrics(self, request: Request) -> Response:
        text, content_type = await self.measures.page(request.headers.get("accept", ""))
        return Response(text, headers={"content-type": content_type})

    async def openapi(self, request: Request) -> Response:
        return _json(openapi.document())

    async def _read(self, request: Request, kind: type[S]) -> S:
        return await read(request, kind, max_bytes=self._config.max_body_bytes, timeout_s=self._config.body_timeout_s)

    def _answer(self, ask: Ask, shape: Shape) -> Response:
        answer = Answer(ask, shape, self._client, self._vocabulary, self._config, self.measures.traffic, self.slowest)
        return Counted(self, answer, ask.num_outputs)

    def take(self, num_outputs: int) -> None:
        """Let so many outputs begin. Raises Overloaded if there are too many already."""
        if self._num_answers + num_outputs > self._config.max_requests:
            raise Overloaded(
                f"{self._num_answers} generations run here, at most {self._config.max_requests}", retry_after_ms=1000
            )
        self._num_answers += num_outputs

    def give_back(self, num_outputs: int) -> None:
        self._num_answers -= num_outputs


class Counted(Response):
    """An answer that counts among those under way while it is told."""

    def __init__(self, gateway: Gateway, answer: Answer, num_outputs: int) -> None:
        self._gateway = gateway
        self._answer = answer
        self._num_outputs = num_outputs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._gateway.take(self._num_outputs)
        try:
            await self._answer(scope, receive, send)
        finally:
            self._gateway.give_back(self._num_outputs)


def make_app(
    config: GatewayConfig,
    client: AsyncClient,
    keys: Keys,
    stopping: asyncio.Event,
    answers: Answers,
    tracer: Tracer | None = None,
) -> Starlette:
    """The application, for a client that is connected within the loop that serves it.

    stopping: set when the server begins to stop; what never ends by itself ends then. answers: where they are counted,
    as are those that never come this far, by the server.
    """
    gateway = Gateway(config, client, answers)
    routes = gateway.routes()
    if config.dashboard == "on":
        routes += Dashboard(config, Watch(gateway.latest, gateway.slowest), stopping).routes()
    answers.know({route.endpoint: route.path for route in routes})
    open_paths = OPEN_PATHS | ({METRICS_PATH} if config.metrics_public else set())
    middleware = [Middleware(Gate, keys=keys, on_answer=answers.count, open_paths=open_paths, tracer=tracer)]
    if config.cors_origin:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=list(config.cors_origin),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # `openai` in a browser sends a dozen of its own; credentials are not among them
            expose_headers=["x-request-id", "retry-after"],
        )
        middleware.insert(0, cors)  # before the key is asked for: a browser's preflight has none
    return Starlette(
        routes=routes,
        middleware=middleware,
        exception_handlers={HTTPException: http_error},
    )


def _json(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
