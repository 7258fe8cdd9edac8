"""Makes a tokenizer small enough to read (all bytes, four merges, three special tokens) and a checkpoint with it."""

from pathlib import Path

import jax.numpy as jnp
from flax import nnx
from models import small_config
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import torch_bridge
from jaxpack.model.transformer import Transformer

EOS, BOS, TURN_ENDS = "<eos>", "<bos>", "<|im_end|>"
_MERGES = [("a", "b"), ("t", "h"), ("th", "e"), ("Ġ", "the")]

# ChatML. If the tokenizer has a BOS token, the template writes it, as Llama 3's does.
CHAT_TEMPLATE = (
    "{{ bos_token or '' }}"
    "{% for message in messages %}"
    "{{ message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
)


def small_tokenizer(
    *, bos: bool = False, chat: bool = False, specials: tuple[str, ...] = ()
) -> PreTrainedTokenizerFast:
    """Makes a byte-level BPE that merges "a" with "b" and the letters of "the"; `bos` begins text with a BOS token."""
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in _MERGES)]
    vocabulary = {word: index for index, word in enumerate([EOS, BOS, TURN_ENDS, *words])}
    tokenizer = Tokenizer(models.BPE(vocabulary, _MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (EOS, BOS, TURN_ENDS, *specials)])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=EOS,
        bos_token=BOS if bos else None,
        chat_template=CHAT_TEMPLATE if chat else None,
    )


def write_checkpoint(folder: Path) -> Path:
    """Writes a Hugging Face folder with a small random float32 Qwen3 and the plain tokenizer. Needs no torch."""
    tokenizer = small_tokenizer()
    config = small_config("qwen3", vocab_size=len(tokenizer))
    torch_bridge.save_pretrained(Transformer(config, dtype=jnp.float32, rngs=nnx.Rngs(0)), str(folder), tokenizer)
    return folder
