"""Tests that each family's greedy text equals transformers' text, beyond windows and original contexts."""

import jax
import pytest
import torch
from transformers import PreTrainedModel

import torch_bridge
from jaxpack import generate
from tests.torch_bridge import hf

PROMPTS = [hf.random_tokens(length, seed=length) for length in (50, 30, 70)]
NEW_TOKENS = 24  # the first text grows past `hf.ORIGINAL_CONTEXT`, the last begins beyond it

# Keys in transformers' cache keep the RoPE frequencies of shorter texts. Phi-3 instead reads a text again when it gets
# long.
_WITHOUT_CACHE = {"llama_dynamic", "llama_longrope"}
_QUICK = {"llama_dynamic", "phi4_mini", "gemma2", "gemma3"}
_PARAMETERS = [pytest.param(name, marks=() if name in _QUICK else pytest.mark.slow) for name in hf.FAMILIES]


def make_model(family: str) -> PreTrainedModel:
    """Makes a model with smaller biases; larger ones would let each token alone decide the next one."""
    model = hf.make_model(f"{family}-untied")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.mul_(0.2)
    return model


@pytest.mark.parametrize("family", _PARAMETERS)
def test_greedy_text_is_that_of_transformers(family: str):
    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "eos_token_id": None, "pad_token_id": 0}
    expected = []
    for prompt in PROMPTS:
        reference = make_model(family)  # made anew: dynamic NTK keeps the frequencies of the longest text so far
        tokens = torch.tensor(prompt[None], dtype=torch.long)
        use_cache = family not in _WITHOUT_CACHE
        written = reference.generate(tokens, attention_mask=torch.ones_like(tokens), use_cache=use_cache, **options)
        expected.append(written[0, len(prompt) :].tolist())
    assert len({token for text in expected for token in text}) > 10, "a text that says little"
    model = torch_bridge.from_torch(reference, dtype="float32")
    with jax.default_matmul_precision("highest"):
        assert generate(model, PROMPTS, max_new_tokens=NEW_TOKENS) == expected
