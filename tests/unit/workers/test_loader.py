from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file

from bus.errors import ModelUnavailable
from workers.checkpoint import fingerprint, inspect
from workers.loader import choose_dtype, load_model
from workers.weight_files import WeightFiles

from .conftest import EOS_ID, VOCAB_SIZE, make_llama, save_model, source_of, write_into

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CPU = torch.device("cpu")
HUGE_HEADER = (2**63).to_bytes(8, "little")


@pytest.fixture
def folder(model_dirs: dict[str, Path], tmp_path: Path) -> Path:
    """A good Llama folder that the test may spoil."""
    shutil.copytree(model_dirs["llama"], tmp_path / "spoilt")
    return tmp_path / "spoilt"


def edit_json(path: Path, **changes: object) -> None:
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | changes))


def write_safetensors(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> None:
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + data)


def entry(begin: int, end: int, shape: list[object] | None = None, dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def refusal(folder: Path) -> str:
    with pytest.raises(ModelUnavailable) as caught:
        load_model(source_of(folder), dtype="float32")
    return caught.value.message


def test_loaded_llama_says_what_it_is(model_dirs: dict[str, Path]) -> None:
    loaded = load_model(source_of(model_dirs["llama"]), dtype="float32")
    shape = loaded.shape
    assert (shape.num_layers, shape.num_heads, shape.num_kv_heads, shape.head_dim) == (3, 4, 2, 8)
    assert (shape.vocab_size, shape.max_model_len) == (VOCAB_SIZE, 128)
    assert loaded.eos_ids == {EOS_ID}
    assert loaded.dtype is torch.float32
    assert not loaded.model.training


def test_loaded_gpt2_says_what_it_is(model_dirs: dict[str, Path]) -> None:
    shape = load_model(source_of(model_dirs["gpt2"]), dtype="float32", max_model_len=100).shape
    assert (shape.num_layers, shape.num_heads, shape.num_kv_heads, shape.head_dim) == (2, 4, 4, 8)
    assert shape.max_model_len == 100


def test_sharded_weights_load(tmp_path: Path) -> None:
    model = make_llama()
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    save_model(make_llama(), tmp_path / "tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "tokenizer" / name, tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    loaded = load_model(source_of(tmp_path / "sharded"), dtype="float32")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, dict(loaded.model.named_parameters())[name])


def test_generation_config_decides_what_ends_a_text(folder: Path) -> None:
    edit_json(folder / "generation_config.json", eos_token_id=[3, 5, 999_999])
    assert load_model(source_of(folder), dtype="float32").eos_ids == {3, 5}


def test_model_that_names_no_end_of_text_has_none(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    edit_json(folder / "config.json", eos_token_id=None)
    edit_json(folder / "tokenizer_config.json", eos_token=None)
    assert load_model(source_of(folder), dtype="float32").eos_ids == frozenset()


def test_max_model_len_past_the_trained_positions_is_refused(folder: Path) -> None:
    with pytest.raises(ModelUnavailable, match=r"129 is not in 1\.\.128"):
        load_model(source_of(folder), dtype="float32", max_model_len=129)


def test_dtype_auto_is_the_checkpoints_on_a_gpu() -> None:
    cuda = torch.device("cuda")
    assert choose_dtype("auto", cuda, torch.float16) is torch.float16
    assert choose_dtype("auto", cuda, torch.float64) is torch.bfloat16
    assert choose_dtype("auto", cuda, None) is torch.bfloat16


@pytest.mark.parametrize(
    ("features", "expected"),
    [({"avx512_bf16": True}, torch.bfloat16), ({"amx_bf16": True}, torch.bfloat16), ({"avx2": True}, torch.float32)],
)
def test_dtype_auto_on_a_cpu_is_bfloat16_only_where_it_is_native(
    monkeypatch: pytest.MonkeyPatch, features: dict[str, bool], expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
    assert choose_dtype("auto", CPU, torch.bfloat16) is expected


def test_dtype_auto_on_a_cpu_is_float32_where_torch_cannot_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert choose_dtype("auto", CPU, torch.bfloat16) is torch.float32


def test_unknown_dtype_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ModelUnavailable, match="auto, float32, bfloat16, float16"):
        choose_dtype("int4", CPU, None)


def test_fingerprint_tells_fine_tunes_and_configs_apart_and_nothing_else(folder: Path) -> None:
    before = fingerprint(inspect(folder))
    (folder / "README.md").write_text("hello")
    assert fingerprint(inspect(folder)) == before
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.2.mlp.down_proj.weight"
    tensors[name][0, 0] += 1e-6
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    other_weights = fingerprint(inspect(folder))
    edit_json(folder / "config.json", rms_norm_eps=1e-3)
    assert len({before, other_weights, fingerprint(inspect(folder))}) == 3


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_model_whose_files_change_behind_the_fingerprint_is_refused(
    folder: Path, file: str, dtype: Literal["float32", "bfloat16"]
) -> None:
    def change(stage: str, _: float) -> None:
        if stage == "reading weights":
            write_into(folder / file)

    with pytest.raises(ModelUnavailable, match=f"{file} was changed"):
        load_model(source_of(folder), dtype=dtype, report=change)


def test_another_file_in_the_place_of_a_models_is_a_change_even_if_it_is_as_old_and_as_long(folder: Path) -> None:
    files = WeightFiles([folder / "model.safetensors"])
    shutil.copy2(folder / "model.safetensors", folder / "new")
    files.check()
    (folder / "new").rename(folder / "model.safetensors")
    with pytest.raises(ModelUnavailable, match="was changed"):
        files.check()
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelUnavailable, match="No such file"):
        files.check()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}, "code is never run"),
        ({"model_type": "mamba"}, "'mamba' is not served; served are: llama, mistral, qwen2"),
        ({"model_type": ["llama"]}, "is not served"),
        ({"sliding_window": 4096}, "the model uses sliding-window attention"),
        (
            {"model_type": "mistral", "architectures": None, "sliding_window": 0},
            "sliding_window = 0; it must be an int",
        ),
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "sliding-window attention"),
        ({"layer_types": ["full_attention", "linear_attention", "full_attention"]}, "layer_types other than full_att"),
        ({"layer_types": [["full_attention"]]}, "layer_types other than"),
        ({"layer_types": 5}, "layer_types must be a list"),
        ({"attn_logit_softcapping": 50.0}, "soft-capped"),
        ({"final_logit_softcapping": 30.0}, "soft-capped"),
        ({"alibi": True}, "ALiBi"),
        ({"position_embedding_type": "alibi"}, "ALiBi"),
        ({"use_bidirectional_attention": True}, "attention to later tokens"),
        ({"slow_but_exact": True}, "slow_but_exact"),
        ({"model_type": "mistral"}, "is not MistralForCausalLM"),
        ({"add_cross_attention": True}, "cross-attention"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope type 'dynamic'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "is not LlamaForCausalLM"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised"),
        ({"num_hidden_layers": 10**6}, "names 1000000 layers, the weights have"),
        ({"num_hidden_layers": 4}, "describes .* parameters, the weights hold"),
        ({"num_hidden_layers": -1}, "num_hidden_layers = -1"),
        ({"num_hidden_layers": True}, "num_hidden_layers = True"),
        ({"hidden_size": 10**9}, "hidden_size = 1000000000"),
        ({"vocab_size": 10**7}, "describes .* parameters"),
        ({"vocab_size": "many"}, "vocab_size = 'many'"),
        ({"intermediate_size": 40}, "cannot be served"),
        ({"num_key_value_heads": 1}, "cannot be served"),
        ({"num_attention_heads": 5}, "cannot be served"),
        ({"hidden_act": "__import__"}, "cannot be served"),
    ],
)
def test_config_that_lies_or_asks_too_much_is_refused(folder: Path, changes: dict[str, Any], words: str) -> None:
    edit_json(folder / "config.json", **changes)
    with pytest.raises(ModelUnavailable, match=words) as caught:
        load_model(source_of(folder), dtype="float32")
    assert caught.value.message.startswith("model 'spoilt' cannot be served: ")


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def only_pickles(folder: Path) -> None:
    remove_weights(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cposix\nsystem\n")


def shards(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def cut_off(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.extra.weight"] = tensors.pop("model.layers.1.mlp.down_proj.weight").clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def deep_json(folder: Path) -> None:
    (folder / "config.json").write_text('{"a":' + "[" * 100_000 + "]" * 100_000 + "}")


def huge_json(folder: Path) -> None:
    with (folder / "config.json").open("wb") as file:
        file.truncate((64 << 20) + 1)


SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (remove_weights, "there is no model.safetensors$"),
    "pickles only": (only_pickles, "pytorch_model.bin may run code"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "there is no config.json"),
    "config not json": (lambda folder: (folder / "config.json").write_text("{"), "config.json is not readable"),
    "config not an object": (lambda folder: (folder / "config.json").write_text("[]"), "holds a list"),
    "config of binary": (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe\x00"), "config.json"),
    "config of 64 MiB": (huge_json, "more than 67108864 bytes"),
    "config nested deep": (deep_json, "config.json is not readable"),
    "tokenizer with code": (
        lambda folder: edit_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["x.Y", None]}),
        "tokenizer_config.json asks for code",
    ),
    "tokenizer broken": (lambda folder: (folder / "tokenizer.json").write_text("{}"), "cannot be served"),
    "adapter": (lambda folder: (folder / "adapter_config.json").write_text("{}"), "adapter"),
    "weights cut off": (cut_off, "cut off"),
    "tensor missing": (drop_tensor, "missing_keys model.layers.1.mlp.down_proj.weight"),
    "shard missing": (lambda folder: shards(folder, {"a": "gone.safetensors"}), "'gone.safetensors' is missing"),
    "shard elsewhere": (lambda folder: shards(folder, {"a": "../spoilt/part.safetensors"}), "is missing"),
    "shard lacks tensor": (lambda folder: shards(folder, {"nothing": "part.safetensors"}), "which lacks it"),
    "index without map": (lambda folder: shards(folder, []), "no weight_map"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_spoilt_folder_is_refused_with_its_reason(folder: Path, case: str) -> None:
    spoil, words = SPOILED[case]
    spoil(folder)
    with pytest.raises(ModelUnavailable, match=words):
        load_model(source_of(folder), dtype="float32")


def test_refused_model_harms_no_other(folder: Path, model_dirs: dict[str, Path]) -> None:
    cut_off(folder)
    refusal(folder)
    assert load_model(source_of(model_dirs["llama"]), dtype="float32").shape.num_layers == 3


LAYOUTS: dict[str, tuple[bytes | dict[str, object], bytes, str]] = {
    "empty file": (b"", b"", "not an object|Expecting value"),
    "not json": (b"{]", b"", "Expecting"),
    "not an object": (b"[1]", b"", "a list, not an object"),
    "nested deep": (b"[" * 100_000, b"", "nested too deep"),
    "name twice": (b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":{}}', b"", "twice"),
    "unknown dtype": ({"a": entry(0, 4, dtype="F33")}, b"1234", "unknown dtype"),
    "dtype of another type": ({"a": entry(0, 4, dtype=["F32"])}, b"1234", "unknown dtype"),
    "negative dimension": ({"a": entry(0, 4, shape=[-1])}, b"1234", "has shape"),
    "bool dimension": ({"a": entry(0, 4, shape=[True])}, b"1234", "has shape"),
    "float dimension": ({"a": entry(0, 4, shape=[1.0])}, b"1234", "has shape"),
    "dimensions overflow": ({"a": entry(0, 4, shape=[2**40, 2**40])}, b"1234", "spans 4 bytes"),
    "dimension past 64 bits": ({"a": entry(0, 4, shape=[2**63])}, b"1234", "has shape"),
    "end before begin": ({"a": entry(4, 0, shape=[1])}, b"1234", "spans -4 bytes"),
    "overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, b"x" * 12, "overlap"),
    "same bytes twice": ({"a": entry(0, 4), "b": entry(0, 4)}, b"1234", "overlap"),
    "hole": ({"a": entry(0, 4), "b": entry(8, 12)}, b"x" * 12, "a hole"),
    "past the end": ({"a": entry(0, 8)}, b"1234", "cut off"),
    "bytes left over": ({"a": entry(0, 4)}, b"12345678", "padded"),
    "extra field": ({"a": entry(0, 4) | {"code": "x"}}, b"1234", "nothing else"),
    "entry not an object": ({"a": 5}, b"", "must have dtype"),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_safetensors_file_that_lies_is_refused(folder: Path, case: str) -> None:
    header, data, words = LAYOUTS[case]
    write_safetensors(
        folder / "model.safetensors", header if isinstance(header, bytes) else json.dumps(header).encode(), data
    )
    with pytest.raises(ModelUnavailable, match=words):
        inspect(folder)


@pytest.mark.parametrize("content", [b"", b"1234567", HUGE_HEADER, HUGE_HEADER + b"{}", b"\xff" * 64])
def test_header_longer_than_its_file_is_refused_before_it_is_read(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelUnavailable, match=r"too few|claims"):
        inspect(folder)


def test_header_over_the_formats_limit_is_refused_even_if_the_file_is_as_long(folder: Path) -> None:
    with (folder / "model.safetensors").open("wb") as file:
        file.write((100_000_001).to_bytes(8, "little"))
        file.truncate(200_000_000)
    assert "the limit is 100000000" in refusal(folder)
