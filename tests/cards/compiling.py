"""Compiles a training step for an NVIDIA card that this machine does not have, with jax's CUDA plugin.

The plugin needs no card if it is told what the card is like. It then compiles every kernel to machine code, and finds
what only a compiler finds: a kernel that wants more shared memory than the card has, or a copy in a bad place. Nothing
runs, and XLA chooses its matmuls without timing them.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, SingleDeviceSharding

from jaxpack import LoraConfig
from jaxpack.bench.models import abstract_model
from jaxpack.constants import Remat
from jaxpack.data.packing import PackedBatch
from jaxpack.kernels import _launch
from jaxpack.model import remat as remat_module
from jaxpack.model.mxfp4 import mxfp4_store
from jaxpack.model.nf4 import nf4_store
from jaxpack.model.presets import SHAPES
from jaxpack.model.remat import compiler_options
from jaxpack.model.weights import move_to_host, split_trained, store_dense
from jaxpack.parallel import device as device_module
from jaxpack.train.step import TrainState, float32_copies, make_train_step

STORES = {"dense": store_dense, "nf4": nf4_store(), "mxfp4": mxfp4_store}
_KIB = 1024


class Card(NamedTuple):
    """Describes a card as XLA needs it: multiprocessors, KiB of shared memory, and 10^9 bytes of memory per second."""

    name: str
    capability: str
    num_cores: int
    shared_kib: int
    bandwidth: int

    @property
    def description(self) -> str:
        """Returns the text of a `GpuTargetConfigProto`."""
        major, minor = self.capability.split(".")
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024
              threads_per_warp: 32
              shared_memory_per_block: {48 * _KIB}
              shared_memory_per_core: {(self.shared_kib + 1) * _KIB}
              shared_memory_per_block_optin: {self.shared_kib * _KIB}
              threads_per_core_limit: 2048
              core_count: {self.num_cores}
              fpus_per_core: 128
              block_dim_limit_x: 2147483647
              block_dim_limit_y: 65535
              block_dim_limit_z: 65535
              memory_bandwidth: {self.bandwidth * 10**9}
              l2_cache_size: 50000000
              clock_rate_ghz: 1.7
              device_memory_size: 150000000000
              cuda_compute_capability {{ major: {major} minor: {minor} }}
              registers_per_core_limit: 65536
              registers_per_block_limit: 65536
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
            runtime_version {{ major: 13 minor: 0 patch: 0 }}
            device_description_str: "{self.name}"
        """


# One card of each kind that differs for a compiler. Where jax knows a card by its name, it need not be there: it knows
# the A10, whose kind is that of an RTX 3090, and the RTX PRO 6000, whose kind is that of an RTX 5090.
CARDS = {
    card.name: card
    for card in (
        Card("NVIDIA A10", "8.6", 72, 99, 600),
        Card("NVIDIA GeForce RTX 4090", "8.9", 128, 99, 1008),
        Card("NVIDIA A100-SXM4-80GB", "8.0", 108, 163, 2039),
        Card("NVIDIA H200", "9.0", 132, 227, 4800),
        Card("NVIDIA RTX PRO 6000", "12.0", 188, 99, 1792),
    )
}


@dataclasses.dataclass(frozen=True)
class Step:
    """Describes the step to compile; the model has the widths of the real one and few layers."""

    model: str
    layers: int = 3
    rows: int = 2
    length: int = 1024
    store: str = "dense"
    remat: Remat = "offload"
    experts: bool = False
    offload_weights: bool = False
    offload_embedding: bool = False


@functools.cache
def device_of(card: str) -> Any:
    """Returns the card's device, on which nothing can run."""
    options = {"topology": "1x1x1", "target_config": CARDS[card].description}
    return topologies.get_topology_desc(card, "cuda", **options).devices[0]


def compiled(step: Step, card: str, patch: pytest.MonkeyPatch) -> jax.stages.Compiled:
    """Compiles a step for a card; `patch` makes the package believe that it is on the card."""
    device = device_of(card)
    here = type("Device", (), {"platform": "gpu", "compute_capability": CARDS[card].capability})()
    for module in (device_module, remat_module):
        patch.setattr(module, "current_device", lambda: here)
    patch.setattr(_launch, "may_lower_for_gpu", lambda: True)
    config = SHAPES[step.model]
    local = config.local_layers and config.local_layers[: step.layers]
    config = dataclasses.replace(config, num_layers=step.layers, local_layers=local)
    lora = LoraConfig(r=16, target_parameters=("gate_up_proj", "down_proj") if step.experts else ())
    model = abstract_model(config, lora, store=STORES[step.store])
    with pytest.MonkeyPatch.context() as on_cpu:  # abstract arrays in host memory need a device that has such memory
        on_cpu.setattr(device_module, "current_device", lambda: jax.devices("cpu")[0])
        move_to_host(model, layers=step.offload_weights, embedding=step.offload_embedding)
    graph, trainable, frozen = split_trained(model)
    trainable = jax.eval_shape(float32_copies, trainable)
    optimizer = optax.adamw(1e-4)
    state = TrainState(trainable, jax.eval_shape(optimizer.init, trainable), jax.ShapeDtypeStruct((), jnp.int32))
    batch = PackedBatch(*4 * [jax.ShapeDtypeStruct((1, step.rows, step.length), jnp.int32)])
    # This device knows no kinds of memory, so the program gets all arrays on the device, and moves them by itself.
    on_host = jax.tree.map(lambda x: getattr(x, "sharding", None) is not None, frozen)
    fetches = {"fetches_layers": step.offload_weights, "fetches_head": step.offload_embedding}
    run = make_train_step(graph, optimizer, remat=step.remat, mesh=Mesh(np.array([device]), ("data",)), **fetches)

    def moved(state: TrainState, frozen: Any, batch: PackedBatch) -> Any:
        hosted = jax.tree.map(
            lambda x, is_there: jax.device_put(x, jax.memory.Space.Host) if is_there else x, frozen, on_host
        )
        return run.__wrapped__(state, hosted, batch)  # pyright: ignore[reportFunctionMemberAccess]

    def placed(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(device))

    lowered = jax.jit(moved).trace(*jax.tree.map(placed, (state, frozen, batch))).lower(lowering_platforms=("cuda",))
    options = {"xla_gpu_autotune_level": 0, **compiler_options(step.remat, **fetches)}
    return lowered.compile(compiler_options=options)
