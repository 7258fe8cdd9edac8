"""Makes small folders of GPT-OSS whose experts are in MXFP4, and the same models with dense experts."""

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tests.torch_bridge import hf

SIZES = {"hidden_size": 64, "intermediate_size": 32}
WEIGHTS = "model.safetensors"


def save(folder: Path) -> tuple[transformers.PreTrainedModel, str]:
    """Writes a random model with experts in MXFP4. Returns the model with dense experts, and the folder's path."""
    prefix, own = hf.FAMILIES["gpt_oss"]
    settings = hf.SETTINGS | {"tie_word_embeddings": False} | own | SIZES
    hf.random_model(prefix, settings).save_pretrained(folder)
    tensors, generator = load_file(folder / WEIGHTS), torch.Generator().manual_seed(3)
    dense = dict(tensors)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(121, 126, (experts, rows, columns // 32), generator=generator, dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        dense[name] = convert_moe_packed_tensors(blocks, scales).float()
    save_file(dense, folder / WEIGHTS, metadata={"format": "pt"})
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (folder / "config.json").write_text(json.dumps(config))
    return reference, str(folder)
