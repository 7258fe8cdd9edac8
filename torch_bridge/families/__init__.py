"""Says per architecture what a Hugging Face `config.json` means, and which tensor is which parameter, as tables.

Adding a family is a file with its `Family` and a line of `FAMILIES`: its tensor table, and a function that reads its
config and refuses by name what it has that jaxpack does not.
"""

from torch_bridge.families import gemma2, gemma3, llama, mistral, phi3, qwen2, qwen3
from torch_bridge.families.base import Family

FAMILIES: dict[str, Family] = {
    "Gemma2ForCausalLM": gemma2.FAMILY,
    "Gemma3ForCausalLM": gemma3.FAMILY,
    "LlamaForCausalLM": llama.FAMILY,
    "MistralForCausalLM": mistral.FAMILY,
    "Phi3ForCausalLM": phi3.FAMILY,
    "Qwen2ForCausalLM": qwen2.FAMILY,
    "Qwen3ForCausalLM": qwen3.FAMILY,
}
