"""Defines the model: embedding, a scan over stacked blocks, a norm, and the head that computes logits."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key, UInt32

from jaxpack.constants import Implementation, Remat
from jaxpack.kernels.adapted_head import AdaptedHead
from jaxpack.kernels.adapter import padded_rank
from jaxpack.kernels.attention import segment_bounds
from jaxpack.kernels.weight import Weight
from jaxpack.model.block import Block
from jaxpack.model.config import ModelConfig
from jaxpack.model.context import PerLayer, RowContext
from jaxpack.model.linear import LoraAdapter, dropped, spread_adapters
from jaxpack.model.moe import RouterSums
from jaxpack.model.noise import add_noise
from jaxpack.model.norm import make_norm
from jaxpack.model.offload import scan_offloaded
from jaxpack.model.pieces import num_pieces
from jaxpack.model.remat import OFFLOADED, keeps, offloaded, recompute, unrolls
from jaxpack.model.rope import document_angles
from jaxpack.model.weights import gathers, is_hosted, is_trained, reads_by_number, weight_of, weights_at
from jaxpack.settings import LoraConfig


class Transformer(nnx.Module):
    """Computes a decoder-only language model over packed rows.

    The parameters of `blocks` are stacked over layers, `[num_layers, ...]`, and scanned, so that compile time does not
    grow with depth, except where `remat` unrolls the scan. A new instance has random weights;
    `torch_bridge.from_pretrained` reads those of a checkpoint.

    Attributes:
      config: the architecture.
      dtype: the dtype of activations and matmuls. Parameters may be wider (float32 where they are trained) and are cast
        to it.
      lora: the adapters of the embedding ("embed_tokens") and of the head ("lm_head"), if they have one.
      lora_config: the settings with which adapters were added; None without adapters.
      rows_of_base: if the vocabulary was resized, the number of first rows of the embedding and the head that are still
        those of the base model; None if it was not. See `resize_vocab`.
      source_files: names and texts of the JSON files that the model was read from; `torch_bridge` writes them again.
      pending: reads the weights into the model, if they are still in their files: its arrays are then abstract, except
        those of adapters. See `read_weights`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxpack import ModelConfig, RopeConfig, Transformer
      >>> config = ModelConfig(
      ...     architecture="LlamaForCausalLM", vocab_size=97, hidden_size=48, intermediate_size=80, num_layers=2,
      ...     num_heads=4, num_kv_heads=2, head_dim=16, rms_norm_eps=1e-6, rope=RopeConfig(theta=1e4),
      ...     tie_word_embeddings=True,
      ... )
      >>> model = Transformer(config, dtype=jnp.float32, rngs=nnx.Rngs(0))
      >>> model.logits(jnp.array([[1, 2, 3]])).shape
      (1, 3, 97)
    """

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike = jnp.bfloat16, rngs: nnx.Rngs):
        initializer = nnx.initializers.normal(0.02)
        self.embedding = nnx.Param(initializer(rngs.params(), (config.vocab_size, config.hidden_size), dtype))

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap
        def stacked(rngs: nnx.Rngs) -> Block:
            return Block(config, dtype=dtype, rngs=rngs)

        self.blocks = stacked(rngs)
        self.norm = make_norm(config, dtype)
        if not config.tie_word_embeddings:
            self.lm_head = nnx.Param(initializer(rngs.params(), (config.vocab_size, config.hidden_size), dtype))
        self.lora = nnx.Dict()
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.lora_config: LoraConfig | None = None  # set by `add_lora`
        self.rows_of_base: int | None = None  # set by `resize_vocab`
        self.source_files: tuple[tuple[str, str], ...] = ()  # set by `torch_bridge`
        self.pending: Callable[[Transformer], None] | None = None  # set by `torch_bridge`

    def read_weights(self) -> None:
        """Reads the weights, if they are still in their files (`torch_bridge.from_pretrained(..., lazy=True)`).

        Raises:
          InputError: the device has too little memory for them, or a file has changed.
        """
        if self.pending is not None:
            self.pending(self)
            self.pending = None

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        *,
        remat: Remat = "full",
        max_segments: int | None = None,
        implementation: Implementation | None = None,
        dropout_key: Key[Array, ""] | None = None,
        neftune_noise_alpha: float | None = None,
        embedded: Float[Array, "B T D"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Returns the hidden states after the last norm, in `dtype`. `with_router_sums` describes the arguments."""
        return self.with_router_sums(
            tokens,
            segment_ids,
            positions,
            remat=remat,
            max_segments=max_segments,
            implementation=implementation,
            dropout_key=dropout_key,
            neftune_noise_alpha=neftune_noise_alpha,
            embedded=embedded,
        )[0]

    def with_router_sums(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        *,
        remat: Remat = "full",
        max_segments: int | None = None,
        implementation: Implementation | None = None,
        dropout_key: Key[Array, ""] | None = None,
        neftune_noise_alpha: float | None = None,
        embedded: Float[Array, "B T D"] | None = None,
        balances: bool = False,
    ) -> tuple[Float[Array, "B T D"], RouterSums | None]:
        """Returns the hidden states after the last norm, in `dtype`, and how a mixture's experts were used.

        The docstring of `PackedBatch` describes `tokens`, `segment_ids` and `positions`.

        Args:
          remat: the choice of what the backward pass computes again, see `model.remat`.
          max_segments: an upper bound on the documents in a row, if known; see `kernels.attention`.
          implementation: the implementation of all kernels; None picks the faster one on each device. With "pallas",
            XLA computes the projections that have no Pallas kernel, see `kernels.extended.unsupported_reason`.
          dropout_key: turns the dropout of LoRA adapters and the noise on. A row's masks and its noise follow from the
            key and from its tokens, so they do not depend on the rows beside it, nor on the device and the micro-batch
            that the row is in.
          neftune_noise_alpha: the size of the noise on the embeddings, see `model.noise`; None for no noise.
          embedded: the tokens' rows of the embedding, if it lies in host memory: see `EmbeddedBatch`.
          balances: whether the sums have what the load-balancing loss reads.
        """
        segments = segment_bounds(segment_ids)
        # A window as long as the row limits nothing.
        windows = [
            window if window is not None and window < tokens.shape[1] else None for window in self.config.windows
        ]
        bounds = PerLayer.of(windows, lambda window: segments if window is None else segments.within(window))
        lengths = segments.last - segments.first
        angles = self.angles(positions, lengths, longest=tokens.shape[1])
        if any(windows):
            max_segments = None  # see `SegmentBounds.within`
        blocks = spread_adapters(self.blocks, self.config.num_layers)
        graph, hosted, stacks, layers = nnx.split(blocks, is_hosted, reads_by_number, ...)
        keys = None
        if dropout_key is not None:
            of_layers = jax.random.split(dropout_key, self.config.num_layers)
            of_rows = jax.vmap(jax.random.fold_in, (None, 0))
            keys = jax.vmap(of_rows, (0, None))(of_layers, row_numbers(tokens, segment_ids))  # [L, B]

        # What is gathered from several devices would be gathered for each piece.
        are_many = num_pieces(tokens.size) > 1
        in_pieces = are_many and not keeps(remat, "gate_up") and not gathers(self.blocks)

        def layer(stream, scanned, shared, fetched):
            (x, total), (parameters, key, number, bound, angle), (stacks, bounds, angles) = stream, scanned, shared
            context = RowContext(
                bounds.at(bound),
                angles.at(angle),
                max_segments,
                implementation,
                balances=balances,
                keeps_gate_up=keeps(remat, "gate_up"),
                in_pieces=in_pieces,
            )
            x, sums, _ = nnx.merge(graph, fetched, weights_at(stacks, number), parameters)(x, context, key)
            return x, jax.tree.map(jnp.add, total, sums)

        numbers = jnp.arange(self.config.num_layers) if jax.tree.leaves(stacks) else None
        scanned, shared = (layers, keys, numbers, bounds.index, angles.index), (stacks, bounds, angles)
        with_input = offloaded(remat, self.config, casts_weights=self.casts_weights)
        layer = recompute(layer, remat, with_input, gathers=gathers(self.blocks))
        experts = self.config.num_experts
        x = self.embed(tokens, embedded)
        if dropout_key is not None and neftune_noise_alpha is not None:
            x = add_noise(x, lengths, row_numbers(tokens, segment_ids), dropout_key, alpha=neftune_noise_alpha)
        stream = x, RouterSums.zeros(experts, balances=balances) if experts else None
        if remat in OFFLOADED or jax.tree.leaves(hosted):
            x, sums = scan_offloaded(layer, stream, scanned, shared, hosted)
        else:

            def step(stream, scanned):
                return layer(stream, scanned, shared, hosted), None  # `hosted` holds no arrays here.

            (x, sums), _ = jax.lax.scan(step, stream, scanned, unroll=unrolls(remat))
        return self.norm(x), sums

    def embed(self, tokens: Int[Array, "B T"], embedded: Float[Array, "B T D"] | None = None) -> Float[Array, "B T D"]:
        """Returns the input of the first layer: the tokens' embeddings, scaled where the architecture does so.

        Args:
          embedded: the tokens' rows of the embedding, if they were taken before.
        """
        x = weight_of(self.embedding).take(tokens, self.dtype) if embedded is None else embedded.astype(self.dtype)
        if (adapter := self._adapter_of("embed_tokens")) is not None:
            lora_a, lora_b, _ = adapter.arrays
            # float32 up to the sum, as in PEFT: an embedding may be as small as its change.
            added = jnp.einsum("BTR,RD->BTD", lora_b[0][tokens], lora_a[0], preferred_element_type=jnp.float32)
            x = (x.astype(jnp.float32) + adapter.scaling * added).astype(self.dtype)
        if self.config.scale_embeddings:
            x = x * jnp.asarray(self.config.hidden_size**0.5, self.dtype)  # rounded to `dtype`, as transformers does
        return x

    def angles(self, positions: Int[Array, "B T"], lengths: Int[Array, "B T"], *, longest: int) -> "PerLayer":
        """Returns the rotary angles of each layer, see `document_angles`."""
        H = self.config.head_dim
        return PerLayer.of(
            self.config.ropes, lambda rope: document_angles(rope, H, positions, lengths, longest=longest)
        )

    @property
    def head(self) -> Weight:
        """Returns the matrix `[V, D]` that turns hidden states into logits; with tied embeddings, the embedding."""
        return weight_of(self.head_variable)

    @property
    def head_variable(self) -> nnx.Variable:
        """Returns the variable that holds `head`."""
        return getattr(self, self.head_name)

    @property
    def head_name(self) -> str:
        """Returns the name of the attribute that holds `head`."""
        return "embedding" if self.config.tie_word_embeddings else "lm_head"

    @property
    def casts_weights(self) -> bool:
        """Returns whether a step casts the weights to a narrower dtype for its matmuls.

        Trained weights are float32. Weights that were trained before and are frozen now may be float32, too.
        """
        scale = self.norm.scale
        return self.dtype != jnp.float32 and (is_trained(scale) or scale.dtype != self.dtype)

    def head_operands(
        self,
        hidden: Float[Array, "B T D"],
        dropout_key: Key[Array, ""] | None = None,
        rows: UInt32[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T E"], Weight]:
        """Returns the operands whose product is the logits: `hidden` and `head`, extended if the head has an adapter.

        Args:
          dropout_key: turns the dropout of the adapter on.
          rows: a number for each row, which its mask follows from, see `row_numbers`; needed with a `dropout_key`.
        """
        if (adapter := self._adapter_of("lm_head")) is None:
            return hidden, self.head
        xa, lora_b = self._head_factors(adapter, hidden, dropout_key, rows)
        return jnp.concatenate([hidden, xa], axis=-1), AdaptedHead(self.head, lora_b)

    def _head_factors(
        self,
        adapter: LoraAdapter,
        hidden: Float[Array, "B T D"],
        dropout_key: Key[Array, ""] | None = None,
        rows: UInt32[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T R"], Float[Array, "V R"]]:
        """Returns the product of `hidden` and the A factor of the head's adapter, and its scaled B factor.

        The rank is padded with zeros to one that matmuls take without a loss.
        """
        lora_a, lora_b, _ = adapter.arrays
        if dropout_key is not None and rows is not None and adapter.dropout:
            # The layers have the keys that `jax.random.split` gives.
            key = jax.random.fold_in(dropout_key, self.config.num_layers)
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
            hidden = dropped(hidden, keys, adapter.dropout)
        xa = jnp.einsum("BTD,RD->BTR", hidden, lora_a[0].astype(hidden.dtype))
        more = padded_rank(xa.shape[-1]) - xa.shape[-1]
        return jnp.pad(xa, ((0, 0), (0, 0), (0, more))), jnp.pad(adapter.scaling * lora_b[0], ((0, 0), (0, more)))

    def _adapter_of(self, name: str) -> LoraAdapter | None:
        return self.lora.get(name)

    def unembed(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Returns the logits of hidden states, in float32."""
        logits = jnp.einsum("BTD,VD->BTV", hidden, self.head.dense(hidden.dtype), preferred_element_type=jnp.float32)
        if (adapter := self._adapter_of("lm_head")) is not None:
            xa, lora_b = self._head_factors(adapter, hidden)
            logits += jnp.einsum("BTR,VR->BTV", xa, lora_b.astype(xa.dtype), preferred_element_type=jnp.float32)
        cap = self.config.final_logit_softcapping
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def logits(self, tokens: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None = None) -> Float[Array, "B T V"]:
        """Returns all logits in float32, for inspection; training never holds all of them at once.

        Without `segment_ids`, each row is one document.
        """
        self.read_weights()
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens)
        return _logits(*nnx.split(self), tokens, segment_ids)


@functools.partial(jax.jit, static_argnums=0)
def _logits(
    graph: nnx.GraphDef, state: nnx.State, tokens: Int[Array, "B T"], segment_ids: Int[Array, "B T"]
) -> Float[Array, "B T V"]:
    model = nnx.merge(graph, state)
    return model.unembed(model(tokens, segment_ids, segment_positions(segment_ids)))


def row_numbers(tokens: Int[Array, "B T"], segment_ids: Int[Array, "B T"]) -> UInt32[Array, " B"]:
    """Returns a number for each row that follows from its tokens alone: a checksum, in which padding does not count."""
    weights = jnp.arange(tokens.shape[1], dtype=jnp.uint32) * jnp.uint32(2654435761) + jnp.uint32(1)
    terms = (tokens.astype(jnp.uint32) + 1) * weights[None, :] * (segment_ids > 0)
    return jnp.sum(terms, axis=1, dtype=jnp.uint32)


def segment_positions(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Returns each token's position in its own segment; a segment starts where the ids change."""
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None, :]
    starts = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1] - 1) != 0
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
