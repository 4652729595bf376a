"""The parts of OpenVINO that are used, imported without being reported: the only place that imports it.

OpenVINO reports its use to its makers from the moment it is imported, unless each user has opted out by a command
of its own. Where its reporting module cannot be imported it is silent, and nobody who runs a cache has asked to be
reported. The paged attention operator's binding is private, which is why the version is pinned (setup.cfg).
"""

from __future__ import annotations

import sys
from typing import Any, cast

sys.modules.setdefault("openvino_telemetry", cast("Any", None))

import openvino as ov  # noqa: E402
from openvino import opset13  # noqa: E402
from openvino.frontend import FrontEndManager  # noqa: E402
from openvino.frontend.pytorch import ConversionExtension  # noqa: E402
from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder  # noqa: E402
from openvino.op import _PagedAttentionExtension as PagedAttentionExtension  # noqa: E402

__all__ = [
    "ConversionExtension",
    "FrontEndManager",
    "PagedAttentionExtension",
    "TorchScriptPythonDecoder",
    "opset13",
    "ov",
]
