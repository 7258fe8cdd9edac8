"""Defines the architecture of a model as frozen dataclasses, which are checked when they are made."""

import dataclasses
from typing import get_args

from jaxpack.constants import Activation
from jaxpack.utils.checks import check, is_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Describes how rotary frequencies are rescaled for longer contexts, with the names that `config.json` uses.

    This is the base of the classes below; `model/rope.py` computes the frequencies of each.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is bool:
                check(isinstance(value, bool), field.name, "must be true or false", value)
            elif field.type == tuple[float, ...]:
                is_list = isinstance(value, tuple) and all(map(is_positive, value))
                check(is_list, field.name, "must be a list of positive numbers", value)
            elif value is not None:
                check(is_positive(value), field.name, "must be a positive number", value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearRopeScaling(RopeScaling):
    """Divides positions by `factor`."""

    factor: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicRopeScaling(RopeScaling):
    """Stretches wavelengths (dynamic NTK) in documents beyond `max_position_embeddings`: the longer, the more."""

    factor: float
    max_position_embeddings: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3RopeScaling(RopeScaling):
    """Holds the parameters of RoPE scaling of the type "llama3", which stretches only long wavelengths (Llama 3.1).

    The fields have the names that `config.json` uses. Let L be `original_max_position_embeddings`. Wavelengths above
    L / `low_freq_factor` are multiplied by `factor`, wavelengths below L / `high_freq_factor` are kept, and those
    between are interpolated. A model has this scaling if it is the `scaling` of its `RopeConfig`.

    Example:
      >>> from jaxpack import Llama3RopeScaling, RopeConfig
      >>> scaling = Llama3RopeScaling(
      ...     factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
      ... )
      >>> rope = RopeConfig(theta=500_000.0, scaling=scaling)
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnRopeScaling(RopeScaling):
    """Stretches only long wavelengths, and multiplies cosine and sine by `attention_factor` (YaRN)."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None  # None: computed from `factor` and the two fields below
    mscale: float | None = None
    mscale_all_dim: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongRopeScaling(RopeScaling):
    """Stretches each wavelength by its own factor (LongRoPE), with other factors in documents of a longer context.

    `short_factor` holds the factors for documents up to `original_max_position_embeddings`, `long_factor` the others.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int
    factor: float
    attention_factor: float | None = None  # None: computed from `factor`


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Describes the rotary position embedding (RoPE) that is `ModelConfig.rope`: its base and its scaling.

    `theta` is the base of the frequencies (`rope_theta` in `config.json`). `scaling` describes how frequencies are
    rescaled for longer contexts; None keeps them as they are.

    Example:
      >>> from jaxpack import RopeConfig
      >>> RopeConfig(theta=1_000_000.0).scaling is None
      True
    """

    theta: float
    scaling: RopeScaling | None = None
    partial_rotary_factor: float = 1.0  # the share of a head's channels, from the first, that is rotated

    def __post_init__(self) -> None:
        check(is_positive(self.theta), "rope_theta", "must be a positive number", self.theta)
        partial = self.partial_rotary_factor
        check(is_positive(partial) and partial <= 1, "partial_rotary_factor", "must be in (0, 1]", partial)

    def rotary_dim(self, head_dim: int) -> int:
        """Returns how many channels of a head are rotated."""
        return int(head_dim * self.partial_rotary_factor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Describes a decoder-only transformer. `torch_bridge` makes one from a Hugging Face `config.json`.

    Example:
      >>> from jaxpack import ModelConfig, RopeConfig
      >>> config = ModelConfig(
      ...     architecture="Qwen3ForCausalLM", vocab_size=97, hidden_size=48, intermediate_size=80, num_layers=2,
      ...     num_heads=4, num_kv_heads=2, head_dim=16, rms_norm_eps=1e-6, rope=RopeConfig(theta=1e6),
      ...     tie_word_embeddings=True, qk_norm=True,
      ... )
      >>> config.num_heads // config.num_kv_heads  # query heads that share a key head
      2
    """

    architecture: str  # the Hugging Face class, which names the tensors of a checkpoint: "Qwen3ForCausalLM"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int  # equal to `num_heads`: multi-head; fewer: grouped queries; 1: multi-query
    head_dim: int  # not always hidden_size / num_heads
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    activation: Activation = "silu"  # activation of the feed-forward's gate
    num_experts: int = 0  # experts that replace the feed-forward of each layer; 0: a dense feed-forward
    num_experts_per_tok: int = 0  # experts that compute each token
    moe_intermediate_size: int = 0  # like `intermediate_size`, of one expert
    norm_topk_prob: bool = True  # whether the shares of a token's experts add up to 1
    router_bias: bool = False  # bias of the router's logits
    experts_bias: bool = False  # biases of all projections of the experts
    attention_sinks: bool = False  # a logit per head that takes part in the softmax and has no value
    qk_norm: bool = False  # RMSNorm of each query and key head before the rotation
    qkv_bias: bool = False
    out_bias: bool = False  # bias of attention's output projection
    mlp_bias: bool = False  # bias of all three projections of the feed-forward
    fused_projections: bool = False  # `qkv_proj` and `gate_up_proj` are one module each, with one adapter
    max_position_embeddings: int | None = None  # tokens of the longest supported text; None: unknown
    sliding_window: int | None = None  # how many tokens a token attends to, itself included; None: no limit
    local_layers: tuple[bool, ...] | None = None  # which layers have the window; None: all layers
    local_rope: RopeConfig | None = None  # rope of the local layers; None: `rope`
    attn_logit_softcapping: float | None = None  # attention scores become cap * tanh(scores / cap)
    final_logit_softcapping: float | None = None  # the same for logits
    query_pre_attn_scalar: float | None = None  # scores are divided by its square root; None: `head_dim`
    scale_embeddings: bool = False  # multiplied by the square root of `hidden_size`
    unit_offset_norms: bool = False  # norms multiply by 1 + weight
    post_norms: bool = False  # each branch's output is normed, too, before it is added
    name_or_path: str = ""  # where the weights came from; adapters name it as their base model

    def __post_init__(self) -> None:
        sizes = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
        )
        for name in sizes:
            value = getattr(self, name)
            check(isinstance(value, int) and value >= 1, name, "must be a whole number of at least 1", value)
        check(self.head_dim % 2 == 0, "head_dim", "must be even", self.head_dim)
        check(is_positive(self.rms_norm_eps), "rms_norm_eps", "must be a positive number", self.rms_norm_eps)
        check(
            self.num_heads % self.num_kv_heads == 0,
            "num_heads",
            f"must be a multiple of `num_kv_heads` ({self.num_kv_heads})",
            self.num_heads,
        )
        for rope in {self.rope, self.local_rope} - {None}:
            self._check_rope(rope)
        self._check_experts()
        activations = get_args(Activation)
        check(self.activation in activations, "activation", f"must be one of {activations}", self.activation)
        for name in ("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar"):
            value = getattr(self, name)
            check(value is None or is_positive(value), name, "must be None or a positive number", value)
        for name in ("max_position_embeddings", "sliding_window"):
            value = getattr(self, name)
            is_whole = isinstance(value, int) and value >= 1
            check(value is None or is_whole, name, "must be None or a whole number of at least 1", value)
        local = self.local_layers
        check(
            local is None or len(local) == self.num_layers,
            "local_layers",
            f"must say it of each of `num_layers` ({self.num_layers})",
            local,
        )

    def _check_experts(self) -> None:
        sizes = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
        least = 1 if self.num_experts else 0
        for name in sizes:
            value = getattr(self, name)
            is_whole = isinstance(value, int) and value >= least
            check(is_whole, name, f"must be a whole number of at least {least}", value)
        check(
            self.num_experts_per_tok <= self.num_experts,
            "num_experts_per_tok",
            f"must be at most `num_experts` ({self.num_experts})",
            self.num_experts_per_tok,
        )
        for name in ("mlp_bias", "post_norms"):
            check(not (self.num_experts and getattr(self, name)), name, "must be False with experts", True)

    def _check_rope(self, rope: RopeConfig) -> None:
        partial, rotary_dim = rope.partial_rotary_factor, rope.rotary_dim(self.head_dim)
        check(
            rotary_dim > 0 and rotary_dim % 2 == 0,
            "partial_rotary_factor",
            f"must rotate an even number of the {self.head_dim} channels of a head",
            partial,
        )
        for name in ("short_factor", "long_factor"):
            factors = getattr(rope.scaling, name, None)
            half = rotary_dim // 2
            check(factors is None or len(factors) == half, name, f"must be a list of {half} numbers", factors)

    @property
    def attention_scale(self) -> float:
        """Returns the factor that attention scores are multiplied by."""
        return (self.query_pre_attn_scalar or self.head_dim) ** -0.5

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Returns the sliding window of each layer, None where there is none."""
        return tuple(self.sliding_window if is_local else None for is_local in self._local)

    @property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """Returns the rope of each layer."""
        return tuple(self.local_rope if is_local and self.local_rope else self.rope for is_local in self._local)

    @property
    def _local(self) -> tuple[bool, ...]:
        return self.local_layers or self.num_layers * (True,)
