"""Base addresses are given with and without /v1, and with a slash too many; the dashboard's paths stay its own."""

from __future__ import annotations

import pytest

from kvcache.gateway.paths import canonical


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("/v1/chat/completions", "/v1/chat/completions"),
        ("/v1/chat/completions/", "/v1/chat/completions"),
        ("/v1//chat/completions", "/v1/chat/completions"),
        ("//v1/completions", "/v1/completions"),
        ("/chat/completions", "/v1/chat/completions"),
        ("/completions/", "/v1/completions"),
        ("/models", "/v1/models"),
        ("/models/org/name", "/v1/models/org/name"),
        ("/v1/models/", "/v1/models"),
        ("/v1/models/org/name/", "/v1/models/org/name"),
        ("/health/", "/health"),
        ("/metrics/", "/metrics"),
    ],
)
def test_a_path_is_found_however_its_base_was_given(given: str, meant: str) -> None:
    assert canonical(given) == meant


@pytest.mark.parametrize(
    "path", ["/", "//", "", "/v1x", "/modelsx", "/chat", "/dashboard", "/dashboard/", "/dashboard//a", "/v2/models"]
)
def test_other_paths_stay_as_they_are(path: str) -> None:
    assert canonical(path) == path
