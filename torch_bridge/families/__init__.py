"""Defines for each architecture how its `config.json` is read and which tensor is which parameter.

To add a family, write a file with its `Family` and add a line to `FAMILIES`. A `Family` has a tensor table, and a
function that reads the config and refuses, by name, each option that jaxpack does not support.
"""

from torch_bridge.families import gemma2, gemma3, gpt_oss, llama, mistral, phi3, qwen2, qwen3, qwen3_moe
from torch_bridge.families.base import Family

FAMILIES: dict[str, Family] = {
    "Gemma2ForCausalLM": gemma2.FAMILY,
    "Gemma3ForCausalLM": gemma3.FAMILY,
    "GptOssForCausalLM": gpt_oss.FAMILY,
    "LlamaForCausalLM": llama.FAMILY,
    "MistralForCausalLM": mistral.FAMILY,
    "Phi3ForCausalLM": phi3.FAMILY,
    "Qwen2ForCausalLM": qwen2.FAMILY,
    "Qwen3ForCausalLM": qwen3.FAMILY,
    "Qwen3MoeForCausalLM": qwen3_moe.FAMILY,
}
