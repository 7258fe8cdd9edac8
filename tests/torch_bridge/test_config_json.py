"""Tests what is read from a `config.json` and written back. Needs no torch."""

import dataclasses
from typing import Any

import pytest
from models import small_config

from jaxpack.errors import InputError
from jaxpack.model.config import (
    DynamicRopeScaling,
    LinearRopeScaling,
    Llama3RopeScaling,
    LongRopeScaling,
    RopeConfig,
    RopeScaling,
    YarnRopeScaling,
)
from jaxpack.model.presets import SHAPES
from torch_bridge.config_json import config_from_hf, config_to_hf

LLAMA3 = Llama3RopeScaling(
    factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)
PUBLISHED = {  # configs in the form of transformers 4
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "model_type": "qwen3",
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 24,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {"rope_type": "llama3"} | dataclasses.asdict(LLAMA3),
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "vocab_size": 128256,
    },
}
WITH_EXPERTS = {  # by their names in `SHAPES`
    "Qwen3-30B-A3B": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "gpt-oss-20b": {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "experts_per_token": 4,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2880,
        "initial_context_length": 4096,
        "intermediate_size": 2880,
        "layer_types": 12 * ["sliding_attention", "full_attention"],
        "model_type": "gpt_oss",
        "num_attention_heads": 64,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 24,
        "num_key_value_heads": 8,
        "num_local_experts": 32,
        "quantization_config": {"modules_to_not_convert": ["model.layers.*.self_attn"], "quant_method": "mxfp4"},
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": 150000,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "vocab_size": 201088,
    },
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": 64 * [1.0],
    "long_factor": 64 * [2.5],
    "original_max_position_embeddings": 8192,
}
SCALINGS = {
    "llama3": LLAMA3,
    "linear": LinearRopeScaling(factor=2.0),
    "dynamic": DynamicRopeScaling(factor=2.0, max_position_embeddings=4096),
    "yarn": YarnRopeScaling(factor=4.0, original_max_position_embeddings=32768, beta_fast=16.0),
    "yarn-mscale": YarnRopeScaling(
        factor=4.0, original_max_position_embeddings=32768, mscale=0.7, mscale_all_dim=1.0, truncate=False
    ),
    "longrope": LongRopeScaling(
        short_factor=10 * (1.0,), long_factor=10 * (2.5,), original_max_position_embeddings=4096, factor=32.0
    ),
}
TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


@TIED
@pytest.mark.parametrize("scaling", [None, *SCALINGS.values()], ids=["default", *SCALINGS])
def test_config_round_trip(family: str, scaling: RopeScaling | None, tied: bool):
    rope = RopeConfig(theta=5e5, scaling=scaling)
    settings = {"max_position_embeddings": 4096, "tie_word_embeddings": tied, "name_or_path": "where it came from"}
    config = small_config(family, rope=rope, **settings)
    assert config_from_hf(config_to_hf(config), "where it came from") == config


def test_published_configs_are_read(family: str):
    config = config_from_hf(PUBLISHED[family], "a/model")
    qwen3 = family == "qwen3"
    assert config.architecture == PUBLISHED[family]["architectures"][0]
    assert (config.vocab_size, config.num_layers) == ((151936, 28) if qwen3 else (128256, 28))
    assert (config.hidden_size, config.intermediate_size) == ((1024, 3072) if qwen3 else (3072, 8192))
    # Qwen3 states its head_dim, which is not 1024 / 16; Llama leaves it out.
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == ((16, 8, 128) if qwen3 else (24, 8, 128))
    assert config.rms_norm_eps == (1e-6 if qwen3 else 1e-5)
    assert config.max_position_embeddings == (40960 if qwen3 else 131072)
    assert config.rope == (RopeConfig(theta=1e6) if qwen3 else RopeConfig(theta=5e5, scaling=LLAMA3))
    assert config.qk_norm == config.tie_word_embeddings == qwen3
    assert config.name_or_path == "a/model"


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_published_mixtures_of_experts_have_the_shapes_that_are_measured(name: str):
    config = config_from_hf(WITH_EXPERTS[name])
    assert config == SHAPES[name]
    assert config_from_hf(config_to_hf(config)) == config


def test_gpt_oss_without_a_rope_has_the_one_of_transformers():
    published = WITH_EXPERTS["gpt-oss-20b"]
    bare = {name: value for name, value in published.items() if not name.startswith("rope_")}
    assert config_from_hf(bare).rope == SHAPES["gpt-oss-20b"].rope
    assert config_from_hf(bare | {"rope_theta": 1e4}).rope.theta == 1e4


REFUSED_EXPERTS = {
    "a dense layer": ("Qwen3-30B-A3B", {"mlp_only_layers": [0]}, r"`mlp_only_layers` must be None, got \[0\]"),
    "every second layer": ("Qwen3-30B-A3B", {"decoder_sparse_step": 2}, "`decoder_sparse_step` must be 1, got 2"),
    "too many choices": ("Qwen3-30B-A3B", {"num_experts_per_tok": 129}, r"`num_experts_per_tok` .* \(128\), got 129"),
    "no experts": ("gpt-oss-20b", {"num_local_experts": 0}, "`num_local_experts` must be a whole number.* got 0"),
    "another limit": ("gpt-oss-20b", {"swiglu_limit": 5.0}, "`swiglu_limit` must be 7.0, got 5.0"),
    "another activation": ("gpt-oss-20b", {"hidden_act": "gelu"}, "`hidden_act` must be 'silu', got 'gelu'"),
    "another quantisation": ("gpt-oss-20b", {"quantization_config": {"quant_method": "fp8"}}, "got FP8"),
    "a width that MXFP4 cannot cut": ("gpt-oss-20b", {"intermediate_size": 100}, "multiple of 32 with MXFP4, got 100"),
    "a quantised Qwen": ("Qwen3-30B-A3B", {"quantization_config": {"quant_method": "mxfp4"}}, "got MXFP4"),
}


@pytest.mark.parametrize("case", REFUSED_EXPERTS)
def test_experts_that_are_not_supported_are_refused_by_name(case: str):
    name, changes, message = REFUSED_EXPERTS[case]
    with pytest.raises(InputError, match=message):
        config_from_hf(WITH_EXPERTS[name] | changes)


def test_old_and_new_forms_of_rope_read_the_same(family: str):
    old = dict(PUBLISHED[family])
    new = dict(old)
    theta, scaling = new.pop("rope_theta"), new.pop("rope_scaling")
    new["rope_parameters"] = (scaling or {"rope_type": "default"}) | {"rope_theta": theta}
    assert config_from_hf(new) == config_from_hf(old)
    if scaling is not None:  # still older configs say `type` for `rope_type`
        scaling = {("type" if field == "rope_type" else field): value for field, value in scaling.items()}
        assert config_from_hf(old | {"rope_scaling": scaling}) == config_from_hf(old)


def test_heads_are_not_grouped_unless_it_is_said(family: str):
    for hf in (
        PUBLISHED[family] | {"num_key_value_heads": None},
        {name: value for name, value in PUBLISHED[family].items() if name != "num_key_value_heads"},
    ):
        assert config_from_hf(hf).num_kv_heads == PUBLISHED[family]["num_attention_heads"]


@pytest.mark.parametrize("option", ["hidden_act", "attention_bias", "quantization_config", "layer_types"])
def test_options_that_are_null_are_off(family: str, option: str):
    assert config_from_hf(PUBLISHED[family] | {option: None}) == config_from_hf(PUBLISHED[family])


UNSUPPORTED = [
    ("architectures", {"architectures": ["GPT2LMHeadModel"]}),
    ("architectures", {"architectures": ["LlamaForCausalLM", "Qwen3ForCausalLM"]}),
    ("architectures", {"architectures": "LlamaForCausalLM"}),
    ("hidden_act", {"hidden_act": "relu2"}),
    ("attention_bias", {"attention_bias": "all"}),
    ("rope_type", {"rope_scaling": {"rope_type": "proportional", "factor": 4.0}}),
    ("rope_type", {"rope_scaling": {"type": "mrope", "factor": 4.0}}),
    ("rope_parameters", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
    ("rope_parameters", {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}}),
    ("partial_rotary_factor", {"partial_rotary_factor": 0.5}),
    ("quantization_config", {"quantization_config": {"quant_method": "fp8"}}),
    ("model_type", {"model_type": "mistral"}),  # transformers reads this field
    ("tie_word_embeddings", {"tie_word_embeddings": "false"}),
    ("num_key_value_heads", {"num_key_value_heads": True}),
    ("rope_theta", {"rope_theta": 0}),
    ("rope_theta", {"rope_theta": []}),
    ("rope_theta", {"rope_theta": None}),
    ("partial_rotary_factor", {"partial_rotary_factor": 0}),
]
UNSUPPORTED_BY = {
    "qwen3": [
        ("use_sliding_window", {"use_sliding_window": 4096}),
        ("layer_types", {"layer_types": ["full_attention", "sliding_attention"]}),
        ("layer_types", {"layer_types": []}),
        ("rope_type", {"rope_parameters": {"rope_type": "axial", "rope_theta": 1e6, "factor": 4.0}}),
    ],
    "llama": [("mlp_bias", {"mlp_bias": 1})],
}


@pytest.mark.parametrize(
    ("family", "option", "change"),
    [(family, *case) for family, cases in UNSUPPORTED_BY.items() for case in UNSUPPORTED + cases],
    ids=str,
)
def test_unsupported_options_are_refused_by_name(family: str, option: str, change: dict[str, Any]):
    with pytest.raises(InputError, match=f"`{option}`") as refused:
        config_from_hf(PUBLISHED[family] | change)
    (value,) = change.values()
    shown = value if not isinstance(value, dict) else value.get("rope_type", value.get("type", value))
    shown = shown[-1] if isinstance(shown, list) and shown else shown
    assert str(shown) in str(refused.value), "the value received is missing"


# The special fields of other families, as published, and the config values that are read from these fields.
QWEN2 = PUBLISHED["qwen3"] | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "sliding_window": 131072}
MISTRAL = PUBLISHED["llama"] | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "rope_scaling": None}
PHI3 = {
    "architectures": ["Phi3ForCausalLM"],
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 262144,
    "tie_word_embeddings": False,
    "vocab_size": 32064,
}
GEMMA2 = {
    "architectures": ["Gemma2ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "max_position_embeddings": 8192,
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "vocab_size": 256000,
}
GEMMA3 = GEMMA2 | {
    "architectures": ["Gemma3ForCausalLM"],
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "rope_local_base_freq": 10000,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
}
GEMMA3_ROPES = {
    "rope": RopeConfig(theta=1e6, scaling=LinearRopeScaling(factor=8.0)),
    "local_rope": RopeConfig(theta=1e4),
}
SPECIAL = {
    "gemma2": (
        GEMMA2,
        {
            "activation": "gelu_tanh",
            "unit_offset_norms": True,
            "post_norms": True,
            "scale_embeddings": True,
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "sliding_window": 4096,
            "local_layers": 13 * (True, False),
            "local_rope": None,
            "tie_word_embeddings": True,
        },
    ),
    "gemma3": (
        GEMMA3,
        {
            "qk_norm": True,
            "final_logit_softcapping": None,
            "sliding_window": 512,
            "local_layers": 4 * (*5 * (True,), False) + 2 * (True,),
            **GEMMA3_ROPES,
        },
    ),
    "gemma3-transformers-5": (
        {name: value for name, value in GEMMA3.items() if not name.startswith("rope")}
        | {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            }
        },
        GEMMA3_ROPES,
    ),
    "qwen2": (QWEN2, {"qkv_bias": True, "out_bias": False, "mlp_bias": False, "sliding_window": None}),
    "qwen2-window": (
        QWEN2 | {"use_sliding_window": True, "max_window_layers": 21},
        {"sliding_window": 131072, "local_layers": 21 * (False,) + 7 * (True,)},
    ),
    "qwen2-layer-types": (
        QWEN2 | {"use_sliding_window": True, "layer_types": 14 * ["sliding_attention", "full_attention"]},
        {"local_layers": 14 * (True, False)},
    ),
    "mistral": (MISTRAL | {"sliding_window": 4096}, {"sliding_window": 4096, "local_layers": None}),
    "mistral-silent": (MISTRAL, {"sliding_window": 4096}),  # the default of transformers
    "mistral-v0.3": (MISTRAL | {"sliding_window": None}, {"sliding_window": None}),
    "phi3-mini-128k": (
        PHI3
        | {
            "rope_scaling": {"type": "su", "short_factor": 48 * [1.05], "long_factor": 48 * [2.5]},
            "original_max_position_embeddings": 4096,
        },
        {
            "fused_projections": True,
            "sliding_window": 262144,
            "rope": RopeConfig(
                theta=1e4,
                scaling=LongRopeScaling(
                    short_factor=48 * (1.05,),
                    long_factor=48 * (2.5,),
                    original_max_position_embeddings=4096,
                    factor=131072 / 4096,
                ),
            ),
        },
    ),
    "phi4-mini": (
        PHI3 | {"head_dim": 128, "partial_rotary_factor": 0.75, "rope_scaling": None},
        {"rope": RopeConfig(theta=1e4, partial_rotary_factor=0.75)},
    ),
    "llama-biases": (
        PUBLISHED["llama"] | {"attention_bias": True, "mlp_bias": True},
        {"qkv_bias": True, "out_bias": True, "mlp_bias": True},
    ),
}


@pytest.mark.parametrize("name", SPECIAL)
def test_what_is_special_about_a_family_is_read_and_written(name: str):
    hf, expected = SPECIAL[name]
    config = config_from_hf(hf)
    assert {field: getattr(config, field) for field in expected} == expected
    assert config_from_hf(config_to_hf(config)) == config


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("qwen2-window", "max_window_layers", None),
        ("qwen2-window", "sliding_window", 0),
        ("qwen2-window", "layer_types", ["full_attention"]),
        ("qwen2-window", "layer_types", 28 * ["chunked_attention"]),
        ("qwen2-window", "layer_types", "full_attention"),
        ("mistral", "sliding_window", "4096"),
        ("mistral", "attention_bias", True),
        ("phi3-mini-128k", "partial_rotary_factor", 1.5),
        ("phi3-mini-128k", "partial_rotary_factor", 0.01),
        ("phi3-mini-128k", "original_max_position_embeddings", "4096"),
        ("phi3-mini-128k", "rope_type", {"rope_type": ["su"]}),
        ("phi3-mini-128k", "factor", {"type": "linear", "factor": [2.0]}),
        ("gemma2", "hidden_activation", ["gelu"]),
        ("gemma2", "use_bidirectional_attention", True),
        ("gemma2", "final_logit_softcapping", 0),
        ("gemma3", "attn_logit_softcapping", 50.0),
        ("gemma3", "sliding_window_pattern", 0),
        ("gemma3", "rope_parameters", {"rope_type": "default", "rope_theta": 1e4}),
        ("gemma3", "query_pre_attn_scalar", "256"),
    ],
    ids=str,
)
def test_what_no_family_has_is_refused_by_name(name: str, option: str, value: Any):
    hf, _ = SPECIAL[name]
    field = "rope_scaling" if isinstance(value, dict) and option != "rope_parameters" else option
    with pytest.raises(InputError, match=f"`{option}`"):
        config_from_hf(hf | {field: value})


def test_an_activation_that_is_null_is_the_family_s():
    hf, _ = SPECIAL["gemma2"]
    assert config_from_hf(hf | {"hidden_activation": None}).activation == "gelu_tanh"


def test_a_rope_scaling_beside_other_rope_parameters_is_refused(family: str):
    """A `rope_scaling` added by hand to a config of transformers 5 contradicts it: transformers uses the addition."""
    parameters = {"rope_type": "default", "rope_theta": 1e6}
    scaling = {"rope_type": "linear", "factor": 4.0}
    hf = PUBLISHED[family] | {"rope_parameters": parameters, "rope_scaling": scaling}
    with pytest.raises(InputError, match="`rope_scaling`"):
        config_from_hf(hf)
    assert config_from_hf(hf | {"rope_parameters": parameters | scaling}).rope.scaling == LinearRopeScaling(factor=4.0)


REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@pytest.mark.parametrize("field", REQUIRED)
def test_missing_fields_are_named(family: str, field: str):
    with pytest.raises(InputError, match=field):
        config_from_hf({name: value for name, value in PUBLISHED[family].items() if name != field})


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Llama3RopeScaling)])
def test_missing_fields_of_the_scaling_are_named(field: str):
    hf = PUBLISHED["llama"]
    scaling = {name: value for name, value in hf["rope_scaling"].items() if name != field}
    with pytest.raises(InputError, match=field):
        config_from_hf(hf | {"rope_scaling": scaling})


def test_longrope_reads_what_is_beside_it():
    """Phi-3 states its original context outside the RoPE parameters, and states its factor nowhere."""
    hf = PUBLISHED["llama"] | {"rope_scaling": LONGROPE, "original_max_position_embeddings": 4096}
    scaling = config_from_hf(hf).rope.scaling
    assert (scaling.original_max_position_embeddings, scaling.factor) == (4096, 131072 / 4096)
    assert scaling.long_factor == 64 * (2.5,)
    with pytest.raises(InputError, match="`short_factor` must be a list of 64 numbers, got"):
        config_from_hf(hf | {"rope_scaling": LONGROPE | {"short_factor": [1.0, 2.0]}})
