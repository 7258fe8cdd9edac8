"""Writes a folder of gpt-oss-20b with random weights in the form in which it is published: its experts in MXFP4.

    PYTHONPATH=. python benchmarks/write_gpt_oss.py FOLDER [--layers 24]

The folder takes 13 GB. It has no tokenizer, as a benchmark needs none.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from jaxpack.kernels.mxfp4 import BLOCK
from jaxpack.model.config import ModelConfig
from jaxpack.model.presets import SHAPES
from torch_bridge.config_json import config_to_hf

SCALE = 120  # The scale is 2^-7. A code's root mean square is 2.9, so weights have a standard deviation of 0.023.


def tensors_of_layer(config: ModelConfig, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Returns the tensors of one layer by their names in it."""
    D, F, E = config.hidden_size, config.moe_intermediate_size, config.num_experts
    N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
    tensors = {"input_layernorm.weight": ones(D), "post_attention_layernorm.weight": ones(D)}
    tensors["self_attn.sinks"] = normal(rng, N)
    for name, shape in {
        "self_attn.q_proj": (N * H, D),
        "self_attn.k_proj": (K * H, D),
        "self_attn.v_proj": (K * H, D),
        "self_attn.o_proj": (D, N * H),
        "mlp.router": (E, D),
    }.items():
        tensors |= {f"{name}.weight": normal(rng, *shape), f"{name}.bias": normal(rng, shape[0])}
    for name, rows, columns in (("gate_up_proj", 2 * F, D), ("down_proj", D, F)):
        blocks = E, rows, columns // BLOCK
        codes = np.frombuffer(rng.bytes(int(np.prod(blocks)) * BLOCK // 2), np.uint8)
        tensors |= {
            f"mlp.experts.{name}_blocks": codes.reshape(*blocks, BLOCK // 2),
            f"mlp.experts.{name}_scales": np.full(blocks, SCALE, np.uint8),
            f"mlp.experts.{name}_bias": normal(rng, E, rows),
        }
    return tensors


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Returns normal numbers with a standard deviation of 0.02 in bfloat16."""
    return (0.02 * rng.standard_normal(shape, np.float32)).astype(ml_dtypes.bfloat16)


def ones(size: int) -> np.ndarray:
    """Returns a norm's scale."""
    return np.ones(size, ml_dtypes.bfloat16)


def write(folder: Path, config: ModelConfig) -> None:
    """Writes the config, one file for each layer, and one for the rest."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    files = {"rest": {"model.norm.weight": ones(config.hidden_size)}}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        files["rest"][name] = normal(rng, config.vocab_size, config.hidden_size)
    index: dict[str, str] = {}
    for layer in ("rest", *range(config.num_layers)):
        of_layer = files.pop("rest") if layer == "rest" else tensors_of_layer(config, rng)
        prefix = "" if layer == "rest" else f"model.layers.{layer}."
        named = {f"{prefix}{name}": tensor for name, tensor in of_layer.items()}
        save_file(named, folder / f"{layer}.safetensors", metadata={"format": "pt"})
        index |= dict.fromkeys(named, f"{layer}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    quantized = {"quantization_config": {"quant_method": "mxfp4"}, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config_to_hf(config) | quantized, indent=1))


def main() -> None:
    """Writes the folder that the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, help="write fewer layers than the model has")
    options = parser.parse_args()
    config = SHAPES["gpt-oss-20b"]
    layers = options.layers or config.num_layers
    config = dataclasses.replace(config, num_layers=layers, local_layers=(config.local_layers or ())[:layers])
    write(options.folder, config)


if __name__ == "__main__":
    main()
