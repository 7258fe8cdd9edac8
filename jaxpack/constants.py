"""Holds names and numbers that several packages share. Imports no jax."""

from typing import Literal

IGNORE = -100  # the target of a position without a target, as in Hugging Face labels
LANES = 128  # the length of every row is a multiple of this

Layout = Literal["padded", "padding-free", "packed"]  # how the documents of a step lie in rows
PackingStrategy = Literal["bfd", "bfd_split", "wrapped"]
Schedule = Literal[
    "linear",
    "cosine",
    "constant",
    "constant_with_warmup",
    "cosine_with_min_lr",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
    "warmup_stable_decay",
]
# Ordered from the least device memory to the fastest.
Remat = Literal["offload", "offload_heads", "full", "keep_attention", "keep_projections", "none"]
RematSetting = Literal["auto", Remat]  # as a user sets it; a step is built with a `Remat`
Offload = Literal["auto", "on", "off"]  # whether frozen weights lie in the host's memory
Implementation = Literal["xla", "pallas"]
Activation = Literal["silu", "gelu_tanh", "gelu", "clamped_silu"]
Optim = Literal["adamw", "adamw_8bit", "lion", "adafactor", "muon", "sgd"]
Destination = Literal["tensorboard", "wandb"]  # where metrics go, besides metrics.jsonl
WHOLE_MODULES = ("embed_tokens", "lm_head")  # Hugging Face names; may be trained whole, beside adapters
POLYNOMIAL_END = 1e-7  # the learning rate at the end of the schedule "polynomial", unless another is given
PINNED_LIMIT = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"  # the environment variable for the host memory that XLA pins
PINNED_GIB = 64  # what XLA pins at most if the variable is not set
HOST_FRACTION = 0.8  # the share of the host's free memory that the commands let XLA pin, if it exceeds `PINNED_GIB`
MEMORY_FRACTION = 0.92  # the share of a GPU's memory that the commands ask for; jax by itself takes 0.75
