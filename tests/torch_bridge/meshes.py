"""Reads folders into shards on all simulated devices: `python meshes.py FOLDER`; prints JSON for each form of weights.

It has the number of arrays that are cut into shards, and whether all arrays have the bits of those on one device.
"""

import json
import sys

import jax
import numpy as np
from flax import nnx

import torch_bridge
from jaxpack.model.shards import deal, in_shards
from jaxpack.model.weights import split_trained
from jaxpack.parallel.mesh import make_mesh


def compare(folder: str, **options: bool) -> dict[str, object]:
    mesh = make_mesh(jax.devices(), fsdp=len(jax.devices()))
    model, _ = torch_bridge.from_pretrained(folder, dtype="float32", lazy=True, **options)
    nnx.update(model, *(deal(state, mesh) for state in split_trained(model)[1:]))
    model.read_weights()
    alone, _ = torch_bridge.from_pretrained(folder, dtype="float32", **options)
    found, expected = (jax.tree.leaves(nnx.state(one)) for one in (model, alone))
    return {
        "in_shards": sum(map(in_shards, found)),
        "same": all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True)),
    }


if __name__ == "__main__":
    folder = sys.argv[1]
    print(json.dumps({"whole": compare(folder), "4 bits": compare(folder, load_in_4bit=True)}))
