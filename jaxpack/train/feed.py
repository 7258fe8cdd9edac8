"""Moves batches to the devices ahead of the steps that take them."""

import contextlib
from collections.abc import Generator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpack.data.batching import BatchSource, StreamEnded
from jaxpack.data.packing import AnyBatch, EmbeddedBatch, PackedBatch
from jaxpack.kernels.host_weight import HostMatrix
from jaxpack.model.transformer import Transformer
from jaxpack.model.weights import weight_of
from jaxpack.parallel.device import current_device
from jaxpack.parallel.mesh import DeviceMesh
from jaxpack.parallel.placement import batch_sharding, put
from jaxpack.utils.prefetch import prefetched


class Feed(NamedTuple):
    """Says where the batches of a run lie, and with which rows of an embedding in the host's memory.

    Attributes:
      sharding: the devices, each with its rows.
      embedding: the embedding, if it lies in the host's memory.
      is_spread: whether there are several devices.
    """

    sharding: Any
    embedding: HostMatrix | None
    is_spread: bool

    @classmethod
    def of(cls, model: Transformer, mesh: DeviceMesh) -> "Feed":
        """Returns the feed of a model on a mesh."""
        weight, is_spread = weight_of(model.embedding), mesh.size > 1
        # The device is named, because a thread does not inherit its caller's `jax.default_device`.
        sharding = batch_sharding(mesh) if is_spread else jax.sharding.SingleDeviceSharding(current_device())
        return cls(sharding, weight if isinstance(weight, HostMatrix) else None, is_spread)

    def put(self, batch: PackedBatch) -> PackedBatch:
        """Returns a batch on the devices, without rows of the embedding."""
        return put(batch, self.sharding)

    def abstract(self, shape: tuple[int, ...]) -> AnyBatch:
        """Returns an abstract batch of a shape `[A, B, T]`, for which a program is compiled."""
        sharding = self.sharding if self.is_spread else None
        batch = PackedBatch(*4 * [jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)])
        if (embedding := self.embedding) is None:
            return batch
        return EmbeddedBatch(*batch, jax.ShapeDtypeStruct((*shape, embedding.shape[1]), embedding.dtype))

    def batches(self, batches: BatchSource, begin: int = 0) -> contextlib.closing[Any]:
        """Returns an iterator over the batches from step `begin` on, each moved while the step before runs.

        It ends with the run, or with the documents of a stream.
        """
        return contextlib.closing(_until_the_end(self._moved(batches, begin, len(batches) - begin)))

    def _moved(self, batches: BatchSource, begin: int, count: int) -> Generator[AnyBatch, None, None]:
        sharding, embedding = self.sharding, self.embedding
        if embedding is None:
            yield from prefetched(lambda step: put(batches[begin + step], sharding), count)
            return
        table = embedding.table

        def embedded(step: int) -> EmbeddedBatch:
            batch = batches[begin + step]
            return EmbeddedBatch(*batch, table[batch.tokens])

        # The rows take much memory. Those of the next batch are made ahead, but wait in the host's memory until the
        # step is started: the device then holds those of two batches, because the step before may still run.
        for batch in prefetched(embedded, count, ahead=1):
            yield jax.device_put(batch, sharding)


def _until_the_end(batches: Generator[AnyBatch, None, None]) -> Generator[AnyBatch, None, None]:
    with contextlib.closing(batches), contextlib.suppress(StreamEnded):
        yield from batches
