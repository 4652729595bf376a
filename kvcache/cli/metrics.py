"""`kvcache metrics`: a cluster's figures for Prometheus, where no gateway shows them."""

from __future__ import annotations

import asyncio
import importlib.util
from typing import Annotated

import typer

from bus.errors import BadArgument
from kvcache import logs
from kvcache.cli.options import Url


def metrics(
    url: Url = None,
    host: Annotated[str, typer.Option("--host", help="Where to listen.", metavar="HOST")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65_535, help="Its port.", metavar="PORT")] = 9410,
    compat: Annotated[
        str,
        typer.Option("--metrics-compat", help="vllm: also under vLLM's names.", show_default=False, metavar="NAME"),
    ] = "",
) -> None:
    """Show a cluster's figures to Prometheus.

    For clusters without a gateway, whose /metrics shows these and more. Runs in the foreground.
    """
    if compat not in {"", "vllm"}:
        raise BadArgument(f"metrics can be compatible with 'vllm', not with {compat!r}")
    if importlib.util.find_spec("prometheus_client") is None:
        raise BadArgument("prometheus_client is not installed; run in the checkout: pip install -e '.[gateway]'")
    logs.configure("info", "text")
    # Here and not above: it stands on a package that is optional.
    from kvcache.metrics.exporter import export

    asyncio.run(export(url, host, port, is_vllm_compatible=compat == "vllm"))
