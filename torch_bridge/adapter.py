"""PEFT adapter folders out: `adapter_config.json` and `adapter_model.safetensors`, as `PeftModel` reads them."""

import json
from pathlib import Path

import numpy as np

from jaxpack.errors import InputError
from jaxpack.files import whole_folder
from jaxpack.lora import adapters
from jaxpack.transformer import Transformer
from torch_bridge.checkpoint import write_tensors
from torch_bridge.names import tensor_table


def save_adapter(model: Transformer, path: str) -> None:
    """Writes the model's LoRA adapters in PEFT's format, float32; the folder appears whole or not at all.

    PEFT drops what it does not expect without a word: weights of modules that are not in `target_modules`, keys with a
    wrong prefix. So both files are made from one table, and every adapter of the model must be in it.

    Raises:
      InputError: the model has no adapters, `path` holds something, or the disk refused a write.
    """
    if not adapters(model):
        raise InputError("`model` must have LoRA adapters (`add_lora`), got one without.")
    tensors = adapter_tensors(model)
    with whole_folder(Path(path), "path") as folder:
        (folder / "adapter_config.json").write_text(json.dumps(_peft_config(model), indent=2, sort_keys=True) + "\n")
        write_tensors(folder / "adapter_model.safetensors", tensors)


def adapter_tensors(model: Transformer) -> dict[str, np.ndarray]:
    """The adapters by PEFT's names: `lora_A` `[r, in]` and `lora_B` `[out, r]` of each layer's modules, float32."""
    found = adapters(model)
    tensors: dict[str, np.ndarray] = {}
    for name, (entry, layer) in tensor_table(model.config).items():
        if entry.projection in found and entry.path.endswith(".weight"):
            adapter, module = found[entry.projection], f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = np.asarray(adapter.lora_a[layer], np.float32)
            tensors[f"{module}.lora_B.weight"] = np.asarray(adapter.lora_b[layer], np.float32)
    assert len(tensors) == 2 * len(found) * model.config.num_layers, "an adapter is missing from the name table"
    return tensors


def _peft_config(model: Transformer) -> dict:
    # The fields that PEFT has had for long: older versions warn of any that they do not know.
    config = model.lora_config
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.config.name_or_path or None,
        "revision": None,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "use_rslora": config.use_rslora,
        "use_dora": False,
        "target_modules": sorted(adapters(model)),
        "rank_pattern": {},
        "alpha_pattern": {},
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,  # never what it was initialised with: PEFT would do that again, to the base weights
    }
