"""Models that cannot be served: each says why, runs nothing of its own, and harms no other on the same worker."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from bus.errors import ModelNotFound, ModelUnavailable
from kvcache import AsyncClient
from tests.harness.cluster import Cluster, running_cluster
from tests.harness.fixtures import TINY_FLAGS
from tests.harness.generations import greedy
from tests.harness.models import Reference
from tests.harness.prompts import PROMPT, token_prompt
from tests.harness.waiting import until

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]

Break = Callable[[Path], None]


def edit_config(change: dict[str, object], name: str = "config.json") -> Break:
    def apply(path: Path) -> None:
        config = json.loads((path / name).read_text())
        (path / name).write_text(json.dumps(config | change))

    return apply


def edit_weights(change: Callable[[bytes], bytes]) -> Break:
    def apply(path: Path) -> None:
        file = path / "model.safetensors"
        file.write_bytes(change(file.read_bytes()))

    return apply


def overlap(data: bytes) -> bytes:
    """Let the second tensor begin inside the first."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    first, second = sorted(
        (name for name in header if name != "__metadata__"), key=lambda n: header[n]["data_offsets"]
    )[:2]
    begin, end = header[second]["data_offsets"]
    shift = header[first]["data_offsets"][1] // 2
    header[second]["data_offsets"] = [begin - shift, end - shift]
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def only_a_pickle(path: Path) -> None:
    """What happens when it is read would show as a file."""
    (path / "model.safetensors").unlink()
    payload = b"cos\nsystem\n(S'touch " + str(path / "was-run").encode() + b"'\ntR."
    for name in ("pytorch_model.bin", "model.pt"):
        (path / name).write_bytes(payload)


def with_code(path: Path) -> None:
    (path / "evil.py").write_text(f"open({str(path / 'was-run')!r}, 'w')\nclass Evil: pass\n")
    edit_config({"auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}})(path)


def with_tokenizer_code(path: Path) -> None:
    (path / "evil.py").write_text(f"open({str(path / 'was-run')!r}, 'w')\nclass Evil: pass\n")
    edit_config({"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}, "tokenizer_config.json")(path)


def no_json(path: Path) -> None:
    (path / "config.json").write_text("{")


BROKEN: dict[str, Break] = {
    "pickled": only_a_pickle,
    "own-code": with_code,
    "own-tokenizer": with_tokenizer_code,
    "cut-off": edit_weights(lambda data: data[: len(data) // 2]),
    "cut-in-header": edit_weights(lambda data: data[:100]),
    "empty": edit_weights(lambda data: b""),
    "huge-header": edit_weights(lambda data: (2**63).to_bytes(8, "little") + data[8:]),
    "overlapping": edit_weights(overlap),
    "padded": edit_weights(lambda data: data + b"\0" * 64),
    "too-wide": edit_config({"hidden_size": 1 << 20, "intermediate_size": 1 << 20}),
    "too-deep": edit_config({"num_hidden_layers": 100_000}),
    "no-json": no_json,
    "other-family": edit_config({"model_type": "mystery", "architectures": ["MysteryForCausalLM"]}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> dict[str, Path]:
    """Copies of the tiny model, each broken in its own way."""
    root = tmp_path_factory.mktemp("broken")
    for name, harm in BROKEN.items():
        shutil.copytree(tiny_model, root / name)
        harm(root / name)
    return {name: root / name for name in BROKEN}


@pytest.fixture(scope="module")
def lazy_cluster(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, folders: dict[str, Path]
) -> Iterator[Cluster]:
    """One worker that serves a good model and all the broken ones, and loads none before it is asked."""
    models = [flag for path in (tiny_model, *folders.values()) for flag in ("--model", str(path))]
    with running_cluster(tmp_path_factory.mktemp("lazy")) as cluster:
        cluster.add_broker()
        cluster.add_worker("lazy", *models, "--no-preload", *TINY_FLAGS, "--kv-cache-memory-bytes", "512MiB")
        cluster.wait_ready()
        yield cluster


@pytest_asyncio.fixture
async def lazy(lazy_cluster: Cluster) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(lazy_cluster.url, timeout=60.0) as client:
        yield client


async def state_of(client: AsyncClient, model: str) -> str:
    (view,) = await client.workers()
    return dict(view.models)[model]


@pytest.mark.parametrize("name", BROKEN)
async def test_broken_model_is_refused_with_its_reason_and_harms_no_other(
    lazy: AsyncClient, reference: Reference, folders: dict[str, Path], name: str
) -> None:
    with pytest.raises(ModelUnavailable, match=name):
        await lazy.generate(PROMPT, model=name, max_tokens=2).result()
    assert not (folders[name] / "was-run").exists(), "code of the model was run"

    async def has_failed() -> bool:
        return await state_of(lazy, name) == "failed"

    await until(has_failed, "its state can be seen")
    stats = (await lazy.stats()).workers[0].stats
    if stats is not None:
        reasons = {model.name: model.reason for model in stats.models if model.state == "failed"}
        assert all(reasons.values())
    tokens, _ = await greedy(lazy, token_prompt(81, 30), 10)
    assert tokens == reference.greedy(token_prompt(81, 30), 10)


async def test_all_who_wait_for_a_model_that_fails_hear_why(lazy: AsyncClient) -> None:
    results = await asyncio.gather(
        *(lazy.generate(PROMPT, model="overlapping", max_tokens=2).result() for _ in range(8)), return_exceptions=True
    )
    assert all(isinstance(result, ModelUnavailable) for result in results), results


async def test_unknown_model_names_those_there_are(lazy: AsyncClient) -> None:
    with pytest.raises(ModelNotFound, match="tiny"):
        await lazy.generate(PROMPT, model="nosuch", max_tokens=2).result()
