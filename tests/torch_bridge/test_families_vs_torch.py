"""Tests that each family computes what transformers and PEFT do with the same weights, see `families.measure`."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import torch_bridge
from tests.kernels.oracles import quick_jit
from tests.torch_bridge import families, hf
from torch_bridge.config_json import config_from_hf, config_to_hf

# PEFT calls deprecated functions of transformers.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


# Families whose features other families have, too. Only `make test-slow` runs them.
_VARIANTS = {
    "llama",
    "llama_biases",
    "llama_linear",
    "llama_dynamic",
    "llama_yarn",
    "llama_longrope",
    "llama3",
    "mistral",
    "mistral_v3",
    "gemma2",
    "phi3",
    "qwen2_window",
    "qwen3_moe_shares",
}
_PARAMETERS = [pytest.param(name, marks=pytest.mark.slow if name in _VARIANTS else ()) for name in hf.FAMILIES]


@pytest.fixture(scope="module", params=_PARAMETERS)
def figures(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> families.Figures:
    return families.measure(f"{request.param}-untied", tmp_path_factory.mktemp("folder"))


# `test_parity_vs_torch.py` has the same tolerances and gives the reasons.


def test_logits_equal_transformers(figures: families.Figures):
    assert figures.logits <= 1e-4


def test_loss_with_lora_equals_peft(figures: families.Figures):
    assert figures.loss <= 1e-5


def test_gradients_of_adapters_and_weights_equal_peft(figures: families.Figures):
    assert figures.gradients <= 1e-4


def test_packed_documents_have_the_logits_that_they_have_alone(figures: families.Figures):
    assert figures.packed <= 1e-5


def test_an_adapter_has_the_tensors_that_peft_writes(figures: families.Figures):
    assert figures.adapter_out


def test_an_adapter_of_peft_has_its_logits(figures: families.Figures):
    assert figures.adapter_in <= 1e-4


def test_a_merged_folder_has_the_logits_of_the_adapter_beside(figures: families.Figures):
    assert figures.merged <= 1e-4


# --- Random configs ---

_LENGTH = 70  # tokens a row; most windows and original contexts are shorter


def random_rope(rng: np.random.Generator, pairs: int, kinds: list[str]) -> tuple[dict[str, Any], int]:
    """Draws RoPE parameters for `pairs` channel pairs. Returns them and a matching `max_position_embeddings`."""
    kind, original = str(rng.choice(kinds)), int(rng.integers(16, 100))
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": float(rng.choice([100, 1e4, 1e6]))}
    if kind in ("linear", "dynamic", "llama3", "yarn"):
        rope["factor"] = float(rng.uniform(1, 8))
    if kind in ("llama3", "yarn", "longrope"):
        rope["original_max_position_embeddings"] = original
    if kind == "llama3":
        rope |= {"low_freq_factor": float(rng.uniform(0.5, 1.5)), "high_freq_factor": float(rng.uniform(2, 6))}
    if kind == "yarn":
        rope |= {"beta_fast": float(rng.uniform(4, 32)), "truncate": bool(rng.integers(2))}
        if rng.integers(2):
            rope |= {"mscale": float(rng.uniform(0.5, 2)), "mscale_all_dim": float(rng.uniform(0.5, 2))}
    if kind == "longrope":
        rope |= {name: rng.uniform(1, 6, pairs).tolist() for name in ("short_factor", "long_factor")}
    if kind in ("yarn", "longrope") and rng.integers(2):
        rope["attention_factor"] = float(rng.uniform(0.8, 1.5))
    return rope, original if kind == "dynamic" else 4 * original


_KINDS = ["default", "linear", "dynamic", "llama3", "yarn", "longrope"]


def random_settings(prefix: str, rng: np.random.Generator) -> dict[str, Any]:
    """Draws a config of a family in which every setting that may differ within the family is random."""
    K, H = int(rng.integers(1, 4)), int(rng.choice([8, 16, 24]))
    N, layers = K * int(rng.integers(1, 4)), int(rng.integers(1, 4))
    rope, longest = random_rope(rng, H // 2, _KINDS)
    flag = [False, True]
    settings = {
        "vocab_size": hf.VOCAB_SIZE,
        "hidden_size": N * (H if prefix == "Phi3" else int(rng.integers(3, 9)) * 2),  # Phi-3's head_dim follows from it
        "intermediate_size": int(rng.integers(10, 60)),
        "num_hidden_layers": layers,
        "num_attention_heads": N,
        "num_key_value_heads": K,
        "head_dim": H,
        "max_position_embeddings": longest,
        "rms_norm_eps": float(rng.choice([1e-3, 1e-5])),
        "hidden_act": str(rng.choice(["silu", "gelu", "gelu_pytorch_tanh"])),
        "rope_parameters": rope,
        "tie_word_embeddings": bool(rng.integers(2)),
    }
    window = int(rng.integers(1, 1.5 * _LENGTH))
    if prefix in ("Llama", "Qwen3", "Gemma2", "Gemma3"):
        settings["attention_bias"] = bool(rng.choice(flag))
    if prefix == "Llama":
        settings["mlp_bias"] = bool(rng.choice(flag))
    if prefix in ("Mistral", "Phi3"):
        settings["sliding_window"] = window if rng.integers(2) else None
    if prefix == "Phi3":
        partial = float(rng.choice([0.5, 0.75, 1.0]))
        rope, longest = random_rope(rng, int(H * partial) // 2, ["default", "longrope"])
        settings |= {"rope_parameters": rope | {"partial_rotary_factor": partial}, "max_position_embeddings": longest}
        settings["original_max_position_embeddings"] = int(rng.integers(16, 100))
    if prefix in ("Qwen2", "Qwen3", "Qwen3Moe"):
        settings |= {"use_sliding_window": bool(rng.choice(flag)), "sliding_window": window}
        settings["max_window_layers"] = int(rng.integers(0, layers + 1))
    if prefix in ("Gemma2", "Gemma3"):
        settings |= {"hidden_activation": settings["hidden_act"], "sliding_window": window}
        settings["layer_types"] = rng.choice(["sliding_attention", "full_attention"], layers).tolist()
        settings["query_pre_attn_scalar"] = int(rng.integers(1, 40))
        settings["final_logit_softcapping"] = float(rng.uniform(1, 9)) if rng.integers(2) else None
    if prefix == "Gemma2":
        settings["attn_logit_softcapping"] = float(rng.uniform(1, 9)) if rng.integers(2) else None
    if prefix in ("Qwen3Moe", "GptOss"):
        experts = int(rng.integers(1, 9))
        settings |= {"num_experts_per_tok": int(rng.integers(1, experts + 1)), "hidden_act": "silu"}
        settings["attention_bias"] = bool(rng.choice(flag))
        # transformers multiplies only rows of whole 16 bytes.
        settings |= {name: -(-settings[name] // 4) * 4 for name in ("hidden_size", "intermediate_size")}
    if prefix == "Qwen3Moe":
        settings |= {"num_experts": experts, "norm_topk_prob": bool(rng.choice(flag))}
        settings["moe_intermediate_size"] = 4 * int(rng.integers(1, 10))
    if prefix == "GptOss":
        settings |= {"num_local_experts": experts, "sliding_window": window}
        settings["layer_types"] = rng.choice(["sliding_attention", "full_attention"], layers).tolist()
    if prefix == "Gemma3":
        local, _ = random_rope(rng, H // 2, ["default", "linear"])
        full, _ = random_rope(rng, H // 2, ["default", "linear"])
        settings["rope_parameters"] = {"full_attention": full, "sliding_attention": local}
    return settings


_PREFIXES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Phi3", "Gemma2", "Gemma3", "Qwen3Moe", "GptOss")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case < len(_PREFIXES) else pytest.mark.slow) for case in range(27)]
)
def test_random_configs_have_the_logits_of_transformers(case: int):
    prefix = _PREFIXES[case % len(_PREFIXES)]
    settings = random_settings(prefix, np.random.default_rng(case))
    reference = hf.random_model(prefix, settings)
    model = torch_bridge.from_torch(reference, dtype="float32")
    tokens = hf.random_tokens(1, _LENGTH, seed=case)
    graph, state = nnx.split(model)
    actual = quick_jit(lambda state, tokens: nnx.merge(graph, state).logits(tokens))(state, jnp.asarray(tokens))
    expected = hf.logits(reference, tokens)
    # Some random configs have larger logits than the families above, and so larger errors.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * max(1, expected.std()), err_msg=str(settings))
    assert config_from_hf(config_to_hf(model.config), model.config.name_or_path) == model.config
