"""Names and numbers that several rooms share. Imports no jax."""

from typing import Literal

IGNORE = -100  # the target of a position that has none, as in Hugging Face labels
LANES = 128  # what the length of every row is a multiple of

Layout = Literal["padded", "padding-free", "packed"]  # of the documents of a step
PackingStrategy = Literal["bfd", "bfd_split", "wrapped"]
Schedule = Literal["linear", "cosine", "constant", "constant_with_warmup"]
# From the frugal to the fast.
Remat = Literal["offload", "offload_heads", "full", "keep_attention", "keep_projections", "none"]
RematSetting = Literal["auto", Remat]  # what a user asks for; a step is made with one of the others
Implementation = Literal["xla", "pallas"]
Activation = Literal["silu", "gelu_tanh", "gelu"]
Destination = Literal["tensorboard", "wandb"]  # of metrics, beside metrics.jsonl
WHOLE_MODULES = ("embed_tokens", "lm_head")  # that may be trained whole beside adapters, by their Hugging Face names
