"""Tests GGUF files with the readers of transformers: their weights, logits and tokens, and what is refused."""

import dataclasses
import errno
import os
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from models import small_model
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import torch_bridge
from jaxpack import InputError, LoraConfig, Transformer, add_lora
from jaxpack.model.config import DynamicRopeScaling, LinearRopeScaling, ModelConfig, RopeConfig, YarnRopeScaling
from tests.torch_bridge import hf
from tests.torch_bridge.gguf_tokenizers import KINDS, TEXTS, byte_level, sentencepiece, split_by, tokenizer_of
from torch_bridge.config_json import config_from_hf
from torch_bridge.gguf_files.architecture import architecture_of
from torch_bridge.gguf_files.vocabulary import read_vocabulary
from torch_bridge.rounding import rounded

gguf = pytest.importorskip("gguf")
# The readers of transformers call deprecated functions, and change tensors that NumPy maps read-only.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

_SQUARE = {"head_dim": 16}
_GEMMA = {"num_hidden_layers": 7, "sliding_window": hf.WINDOW, "query_pre_attn_scalar": 20}
_GEMMA_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}


def _kinds(every: int) -> list[str]:
    return ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(7)]


# The prefix of the classes, the settings in which a model differs from the others, and whether transformers reads all
# of its settings from a GGUF file; otherwise it gets them from `config.json`.
FAMILIES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "llama": ("Llama", {"head_dim": 20}, True),
    "llama_biases": ("Llama", {"attention_bias": True, "mlp_bias": True}, False),
    "llama3": ("Llama", {"rope_parameters": hf._LLAMA3}, False),
    "llama_linear": ("Llama", hf.scaled("linear"), False),
    "mistral": ("Mistral", {"sliding_window": None}, True),
    "qwen2": ("Qwen2", _SQUARE, True),
    "qwen3": ("Qwen3", {"head_dim": 128, "tie_word_embeddings": True}, True),
    "gemma2": (
        "Gemma2",
        _GEMMA
        | {"layer_types": _kinds(2), "attn_logit_softcapping": 1.5, "final_logit_softcapping": 3.0}
        | {"tie_word_embeddings": True},
        False,
    ),
    "gemma3": (
        "Gemma3",
        _GEMMA | {"layer_types": _kinds(6), "rope_parameters": _GEMMA_ROPES, "tie_word_embeddings": True},
        False,
    ),
}


def tokenizer_for(family: str) -> PreTrainedTokenizerFast:
    return tokenizer_of({"gemma2": "gemma", "gemma3": "gemma", "mistral": "llama2"}.get(family, "qwen2"))


def base_model(parent: Path, family: str) -> tuple[Transformer, Path]:
    """Writes a folder with a random model, some tokens more in its embedding than in its tokenizer, and reads it."""
    prefix, own, _ = FAMILIES[family]
    sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": len(tokenizer_for(family)) + 3}
    torch_model = hf.random_model(prefix, hf.SETTINGS | sizes | {"tie_word_embeddings": False} | own)
    torch_model.save_pretrained(parent / "base")
    return torch_bridge.from_pretrained(str(parent / "base"), dtype="float32")[0], parent / "base"


def with_adapters(model: Transformer) -> Transformer:
    add_lora(model, LoraConfig(r=4, lora_alpha=8))
    rng = np.random.default_rng(0)
    for _, parameter in nnx.iter_graph(model):
        if isinstance(parameter, nnx.LoRAParam):
            parameter.set_value(parameter[...] + rng.normal(0, 0.1, parameter.shape).astype(np.float32))
    return model


def read_gguf(path: Path, base: Path | None) -> torch.nn.Module:
    config = None if base is None else AutoConfig.from_pretrained(base)
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, config=config, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def fields(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_computes_the_same_logits_and_tokens(family: str, tmp_path: Path):
    model, base = base_model(tmp_path, family)
    model = with_adapters(model)
    path, tokenizer = tmp_path / "out" / "model.gguf", tokenizer_for(family)
    path.parent.mkdir()
    torch_bridge.save_gguf(model, path, tokenizer, quantize="f32")
    assert sorted(found.name for found in path.parent.iterdir()) == ["model.Modelfile", "model.gguf"]
    theirs = read_gguf(path, None if FAMILIES[family][2] else base)
    tokens = hf.random_tokens(2, 40)
    np.testing.assert_allclose(hf.logits(theirs, tokens), model.logits(jnp.asarray(tokens)), rtol=0, atol=1e-4)

    torch_bridge.save_merged(model, tmp_path / "merged", dtype="float32")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    for name, tensor in theirs.state_dict().items():
        offset = 1e-6 if "gemma" in family and name.endswith("norm.weight") else 0  # 1 is added and taken away
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=offset, msg=name)
    written = fields(path)
    assert written["tokenizer.chat_template"] == tokenizer.chat_template
    assert written["tokenizer.ggml.eot_token_id"] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert written["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    stops = f'PARAMETER stop "<|im_end|>"\nPARAMETER stop "{tokenizer.eos_token}"\n'
    assert path.with_suffix(".Modelfile").read_text() == f"FROM ./model.gguf\n{stops}"


@pytest.mark.one_in(3)
@pytest.mark.parametrize("quantize", ["bf16", "f16", "q8_0"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_matrices_are_rounded_once_and_vectors_are_kept(
    family: str, quantize: str, tmp_path: Path, capsys: pytest.CaptureFixture
):
    model, base = base_model(tmp_path, family)
    model = with_adapters(model)
    torch_bridge.save_gguf(model, tmp_path / "model.gguf", tokenizer_for(family), quantize=quantize)
    assert "the merged model's logits differ from the trained model's by at most" in " ".join(
        capsys.readouterr().err.split()
    )
    torch_bridge.save_merged(model, tmp_path / "merged", dtype="float32")
    exact = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    for name, tensor in read_gguf(tmp_path / "model.gguf", base).state_dict().items():
        actual, whole = tensor.numpy(), exact[name].numpy()
        if whole.ndim == 1:
            np.testing.assert_allclose(actual, whole, rtol=0, atol=1e-6)
            continue
        if quantize != "q8_0":
            dtype = torch.bfloat16 if quantize == "bf16" else torch.float16
            np.testing.assert_array_equal(actual, exact[name].to(dtype).float().numpy())
            continue
        blocks = whole.reshape(-1, 32)
        # Half a step, and what the scale loses as float16: at most 127 codes times 2^-11 of it.
        bound = np.abs(blocks).max(1, keepdims=True) / 127 * (0.5 + 127 / 2**11) + 1e-7
        assert (np.abs(actual.reshape(-1, 32) - blocks) <= bound).all()
        # The rows of queries and keys change places only, so the logits that are compared have these very weights.
        np.testing.assert_allclose(actual, rounded(jnp.asarray(whole), "q8_0"), rtol=1e-6, atol=0)


def test_rows_that_cannot_be_cut_into_blocks_stay_in_float32(tmp_path: Path):
    model = small_model("qwen3", vocab_size=len(tokenizer_of("qwen2")))
    assert model.config.hidden_size % 32
    torch_bridge.save_gguf(model, tmp_path / "model.gguf", tokenizer_of("qwen2"), quantize="q8_0")
    forms = {t.name: t.tensor_type for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert forms["blk.0.attn_q.weight"] == gguf.GGMLQuantizationType.F32
    assert forms["blk.0.attn_norm.weight"] == gguf.GGMLQuantizationType.F32


@pytest.mark.one_in(2)
@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_of_the_file_are_those_of_the_tokenizer(kind: str, tmp_path: Path):
    tokenizer = tokenizer_of(kind)
    settings = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    prefix, own, _ = FAMILIES["gemma3" if kind == "gemma" else "llama"]
    hf.random_model(prefix, hf.SETTINGS | own | settings).save_pretrained(tmp_path / "base")
    model, _ = torch_bridge.from_pretrained(str(tmp_path / "base"))
    torch_bridge.save_gguf(model, tmp_path / "model.gguf", tokenizer)
    written = fields(tmp_path / "model.gguf")
    begins = kind in ("llama-bpe", "tekken", "llama2", "gemma")
    assert written["tokenizer.ggml.add_bos_token"] == begins
    assert written["tokenizer.ggml.pre"] == (kind if kind not in ("llama2", "gemma") else "default")
    assert written["tokenizer.ggml.model"] == ("llama" if kind in ("llama2", "gemma") else "gpt2")
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    texts = TEXTS
    if kind == "smollm":  # which transformers reads as "gpt-2", which does not split digits; llama.cpp does
        texts = [text for text in TEXTS if not any(map(str.isdigit, text))]
    assert len(texts) >= 10
    for text in texts:
        assert theirs(text).input_ids == tokenizer(text).input_ids, text


def test_the_metadata_of_gemma_3(tmp_path: Path):
    model, _ = base_model(tmp_path, "gemma3")
    torch_bridge.save_gguf(model, tmp_path / "model.gguf", tokenizer_for("gemma3"), quantize="q8_0")
    found = fields(tmp_path / "model.gguf")
    expected = {
        "context_length": 512,
        "vocab_size": len(tokenizer_for("gemma3")) + 3,
        "embedding_length": 64,
        "feed_forward_length": 96,
        "block_count": 7,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 20,
        "attention.value_length": 20,
        "attention.layer_norm_rms_epsilon": np.float32(1e-3),
        "attention.sliding_window": hf.WINDOW,
        "rope.dimension_count": 20,
        "rope.freq_base": 1e6,
        "rope.scaling.type": "linear",
        "rope.scaling.factor": 8.0,
    }
    assert {
        name.removeprefix("gemma3."): value for name, value in found.items() if name.startswith("gemma3.")
    } == expected
    assert found["general.architecture"] == "gemma3"
    assert found["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0
    assert found["tokenizer.ggml.add_space_prefix"] is False
    assert found["tokenizer.ggml.tokens"][-1] == f"[PAD{len(tokenizer_for('gemma3')) + 2}]"
    kinds = np.array(found["tokenizer.ggml.token_type"])
    assert (kinds[-3:] == gguf.TokenType.UNUSED).all()
    assert (kinds == gguf.TokenType.BYTE).sum() == 256
    assert kinds[3] == gguf.TokenType.UNKNOWN


def test_llama_3s_frequencies_are_divided_as_in_transformers(tmp_path: Path):
    model, base = base_model(tmp_path, "llama3")
    torch_bridge.save_gguf(model, tmp_path / "model.gguf", tokenizer_for("llama3"))
    (divisors,) = (t.data for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors if t.name == "rope_freqs.weight")
    theirs = AutoModelForCausalLM.from_pretrained(base).model.rotary_emb.inv_freq.numpy()
    plain = 1e4 ** -(np.arange(0, 20, 2, dtype=np.float32) / 20)
    np.testing.assert_allclose(plain / divisors, theirs, rtol=1e-6)


def test_yarn_names_the_factor_beside_that_of_the_paper(tmp_path: Path):
    scaling = YarnRopeScaling(factor=4.0, original_max_position_embeddings=128, attention_factor=0.8)
    config = small_model("qwen3", vocab_size=len(tokenizer_of("qwen2"))).config
    config = dataclasses.replace(config, rope=RopeConfig(theta=1e4, scaling=scaling))
    model = Transformer(config, dtype=jnp.float32, rngs=nnx.Rngs(0))
    torch_bridge.save_gguf(model, tmp_path / "model.gguf", tokenizer_of("qwen2"))
    found = fields(tmp_path / "model.gguf")
    assert found["qwen3.rope.scaling.type"] == "yarn"
    assert found["qwen3.rope.scaling.original_context_length"] == 128
    # llama.cpp multiplies 1 + 0.1 ln(factor) by the number in the file.
    assert found["qwen3.rope.scaling.attn_factor"] * (1 + 0.1 * np.log(4)) == pytest.approx(0.8, rel=1e-6)


def test_a_window_that_llama_cpp_has_not_ends_the_context(tmp_path: Path, capsys: pytest.CaptureFixture):
    config = {"architectures": ["MistralForCausalLM"], **hf.SETTINGS, "vocab_size": len(tokenizer_of("llama2"))}
    config = config_from_hf(config | {"sliding_window": 100, "model_type": "mistral"})
    model = Transformer(config, dtype=jnp.float32, rngs=nnx.Rngs(0))
    torch_bridge.save_gguf(model, tmp_path / "model.gguf", tokenizer_of("llama2"))
    assert fields(tmp_path / "model.gguf")["llama.context_length"] == 100
    assert "texts may have 100 tokens" in " ".join(capsys.readouterr().err.split())


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def config_of(family: str, **changes: Any) -> ModelConfig:
    prefix, own, _ = FAMILIES[family]
    described = {"architectures": [f"{prefix}ForCausalLM"], **hf.SETTINGS, **own}
    config = config_from_hf({name: value for name, value in described.items() if value is not None})
    return dataclasses.replace(config, **changes)


@pytest.mark.one_in(1)
@pytest.mark.parametrize(
    ("config", "fragment"),
    [
        (lambda: small_model("qwen3_moe").config, "have one of the architectures .* got Qwen3MoeForCausalLM"),
        (lambda: small_model("gpt_oss").config, "got GptOssForCausalLM.*convert_hf_to_gguf.py"),
        (lambda: config_of("qwen3", qkv_bias=True), "biases"),
        (lambda: config_of("qwen2", head_dim=20), "heads of together 80 channels"),
        (lambda: config_of("llama", activation="gelu"), "the activation 'gelu'"),
        (
            lambda: config_of(
                "llama", rope=RopeConfig(theta=1e4, scaling=DynamicRopeScaling(factor=2, max_position_embeddings=64))
            ),
            "RoPE scaling of the kind 'dynamic'",
        ),
        (lambda: config_of("qwen3", rope=config_of("llama3").rope), "Llama 3's RoPE scaling"),
        (
            lambda: config_of(
                "llama",
                rope=RopeConfig(
                    theta=1e4,
                    scaling=YarnRopeScaling(factor=2, original_max_position_embeddings=64, beta_fast=8.0),
                ),
            ),
            "YaRN",
        ),
        (lambda: config_of("gemma3", local_layers=7 * (True,)), "all but each 6th"),
        (lambda: config_of("gemma3", query_pre_attn_scalar=7), "`query_pre_attn_scalar` of 7 instead of 20"),
        (lambda: config_of("gemma3", local_rope=RopeConfig(theta=5.0)), "instead of a plain one"),
        (lambda: config_of("gemma2", tie_word_embeddings=False), "a head that is not the embedding"),
        (lambda: config_of("gemma2", attn_logit_softcapping=None), "no soft-caps"),
        (
            lambda: config_of("gemma2", rope=RopeConfig(theta=1e4, scaling=LinearRopeScaling(factor=2))),
            "a scaled RoPE",
        ),
    ],
    ids=_text,
)
def test_a_model_that_llama_cpp_computes_in_another_way_is_refused(config: Any, fragment: str):
    with pytest.raises(InputError, match=f"`model` must .*{fragment}"):
        architecture_of(config())


def changed(kind: str, **parts: Any) -> PreTrainedTokenizerFast:
    """Returns a tokenizer with other parts."""
    tokenizer = KINDS[kind]()
    for name, part in parts.items():
        setattr(tokenizer.backend_tokenizer, name, part)
    return tokenizer


@pytest.mark.one_in(1)
@pytest.mark.parametrize(
    ("tokenizer", "fragment"),
    [
        (lambda: None, "be given, because a GGUF file holds the tokenizer, too, got None"),
        (lambda: byte_level(split_by(r"\w+")), "the pre-tokenizer"),
        (lambda: changed("gpt-2", pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)), "the pre-tokenizer"),
        (lambda: changed("gpt-2", normalizer=normalizers.Lowercase()), "a normalizer of the type 'Lowercase'"),
        (lambda: changed("llama2", normalizer=normalizers.NFKC()), "the normalizer"),
        (lambda: changed("llama2", pre_tokenizer=pre_tokenizers.Whitespace()), "the pre-tokenizer"),
        (lambda: sentencepiece(gemma=False, missing=1), "no merge of"),
        (
            lambda: PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))),
            "a model of the type 'WordLevel'",
        ),
    ],
    ids=_text,
)
def test_a_tokenizer_that_llama_cpp_has_not_is_refused(tokenizer: Any, fragment: str):
    with pytest.raises(InputError, match=f"`tokenizer` must .*{fragment}"):
        read_vocabulary(tokenizer(), 1000)


def test_a_tokenizer_larger_than_the_embedding_is_refused():
    with pytest.raises(InputError, match="at most 300 tokens, the rows of the model's embedding"):
        read_vocabulary(tokenizer_of("qwen2"), 300)


@pytest.fixture
def tiny() -> Transformer:
    return small_model("qwen3", vocab_size=len(tokenizer_of("qwen2")))


@pytest.mark.one_in(1)
@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        ({"quantize": "q4_k_m"}, "`quantize` must be one of .*`llama-quantize model.gguf model-q4_k_m.gguf q4_k_m`"),
        ({"quantize": "int8"}, "`quantize` must be one of .* got 'int8'.$"),
        ({"base": "somewhere"}, "`base` must be None for a model without adapters"),
        ({"path": "model.bin"}, "`path` must end in .gguf"),
        ({"path": "nowhere/model.gguf"}, "`path` must be a new file in an existing folder"),
        ({"path": "x" * 300 + ".gguf"}, "`path` must be"),
        ({"path": "there.gguf"}, "`path` must be a new file"),
        ({"path": "beside.gguf"}, "`path` must be a new file.*beside.Modelfile"),
    ],
    ids=str,
)
def test_bad_input(options: dict[str, Any], fragment: str, tiny: Transformer, tmp_path: Path):
    (tmp_path / "there.gguf").write_text("mine")
    (tmp_path / "beside.Modelfile").write_text("mine")
    path = tmp_path / options.pop("path", "model.gguf")
    with pytest.raises(InputError, match=fragment):
        torch_bridge.save_gguf(tiny, path, tokenizer_of("qwen2"), **options)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {
        "there.gguf": "mine",
        "beside.Modelfile": "mine",
    }


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), OSError("9 requested and 0 written")]
)
def test_a_disk_that_fills_leaves_nothing(
    error: OSError, tiny: Transformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write, count = gguf.GGUFWriter.write_tensor_data, []

    def fill(writer: Any, tensor: np.ndarray) -> None:
        count.append(tensor)
        if len(count) == 5:
            raise error
        write(writer, tensor)

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", fill)
    with pytest.raises(InputError, match=r"`path` must be writable, got .*(No space left|probably full \(9 requested)"):
        torch_bridge.save_gguf(tiny, tmp_path / "model.gguf", tokenizer_of("qwen2"))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_refused_at_the_start(
    tiny: Transformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(InputError, match=r"`path` must have .* bytes free"):
        torch_bridge.save_gguf(tiny, tmp_path / "model.gguf", tokenizer_of("qwen2"))


def test_weights_that_a_file_cannot_hold_are_refused(tiny: Transformer, tmp_path: Path):
    tiny.embedding.set_value(tiny.embedding[...].at[0, 0].set(1e5))
    with pytest.raises(InputError, match=r"finite weights in f16, .*model.embed_tokens.weight.*'bf16'"):
        torch_bridge.save_gguf(tiny, tmp_path / "model.gguf", tokenizer_of("qwen2"), quantize="f16")
    assert list(tmp_path.iterdir()) == []
    torch_bridge.save_gguf(tiny, tmp_path / "model.gguf", tokenizer_of("qwen2"), quantize="q8_0")


def test_adapters_that_change_nothing_are_refused(tiny: Transformer, tmp_path: Path):
    add_lora(tiny, LoraConfig(r=4))
    with pytest.raises(InputError, match="adapters that change none in q8_0"):
        torch_bridge.save_gguf(tiny, tmp_path / "model.gguf", tokenizer_of("qwen2"), quantize="q8_0")
    assert list(tmp_path.iterdir()) == []


def test_the_package_is_named_if_it_is_missing(tiny: Transformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match=r"`save_gguf` needs the Python package gguf.*jaxpack\[gguf\]"):
        torch_bridge.save_gguf(tiny, tmp_path / "model.gguf", tokenizer_of("qwen2"))
