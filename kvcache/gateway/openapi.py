"""The OpenAPI document, made from the very types that requests are read with and answers are written from. Core."""

from __future__ import annotations

from functools import cache
from importlib.metadata import version
from typing import Any

import msgspec

from kvcache.gateway import replies, schema
from kvcache.gateway.problems import ErrorBody

_ERRORS = {
    "400": "The request is wrong as it stands; the message says where.",
    "401": "The API key is missing or unknown.",
    "404": "There is no such model.",
    "408": "The body did not arrive in time.",
    "413": "The body is too large.",
    "415": "The body is not JSON.",
    "429": "There is too much to do; Retry-After says when to come again.",
    "503": "Nobody can serve it now; Retry-After says when to come again.",
    "504": "It took longer than the server allows.",
}

_POSTS: tuple[tuple[str, str, type, type, type | None], ...] = (
    ("/v1/completions", "Go on from a prompt.", schema.CompletionRequest, replies.Completion, replies.Completion),
    ("/v1/chat/completions", "Answer a chat.", schema.ChatRequest, replies.ChatCompletion, replies.ChatChunk),
    ("/tokenize", "Tell which tokens a prompt is.", schema.TokenizeRequest, replies.Tokenized, None),
    ("/detokenize", "Tell what tokens look like.", schema.DetokenizeRequest, replies.Detokenized, None),
)
_GETS: tuple[tuple[str, str, type | None], ...] = (
    ("/v1/models", "List the models.", replies.ModelList),
    ("/v1/models/{model}", "Show one model.", replies.ModelCard),
    ("/health", "Whether a worker answers.", replies.Status),
    ("/ready", "Whether a worker has a model loaded.", replies.Status),
    ("/version", "The version of the gateway.", replies.Version),
    ("/server_info", "The configuration in force, and the cluster.", None),
    ("/metrics", "Figures for Prometheus, as text.", None),
    ("/openapi.json", "This document.", None),
)
_TEXTS = frozenset({"/metrics"})
"""What answers as plain text."""


@cache
def document() -> dict[str, Any]:
    """The whole document, as plain data."""
    types = [ErrorBody, *(kind for post in _POSTS for kind in post[2:] if kind), *(kind for *_, kind in _GETS if kind)]
    unique = list(dict.fromkeys(types))
    made, components = msgspec.json.schema_components(unique, ref_template="#/components/schemas/{name}")
    refs = dict(zip(unique, made, strict=True))
    paths: dict[str, Any] = {}
    for path, summary, body, answer, chunk in _POSTS:
        content: dict[str, Any] = {"application/json": {"schema": refs[answer]}}
        if chunk is not None:
            note = {"description": f"Events of {chunk.__name__}, then `data: [DONE]`", "type": "string"}
            content["text/event-stream"] = {"schema": note}
        request = {"required": True, "content": {"application/json": {"schema": refs[body]}}}
        paths[path] = {"post": _operation(summary, content, refs) | {"requestBody": request}}
    for path, summary, shown in _GETS:
        schema_of = {"type": "string"} if path in _TEXTS else refs[shown] if shown else {}
        media = "text/plain" if path in _TEXTS else "application/json"
        operation = _operation(summary, {media: {"schema": schema_of}}, refs)
        if "{model}" in path:
            operation["parameters"] = [
                {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
            ]
        paths[path] = {"get": operation}
    return {
        "openapi": "3.1.0",
        "info": {"title": "kvcache gateway", "version": version("kvcache")},
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }


def _operation(summary: str, content: dict[str, Any], refs: dict[type, Any]) -> dict[str, Any]:
    error = {"application/json": {"schema": refs[ErrorBody]}}
    answers = {"200": {"description": "The answer.", "content": content}}
    return {
        "summary": summary,
        "security": [{}, {"key": []}],
        "responses": answers | {code: {"description": text, "content": error} for code, text in _ERRORS.items()},
    }
