"""Trains on all simulated devices of this process: `python meshes.py KIND MESH ROWS MICRO [OUTPUT [CHECKPOINT]]`.

KIND is "adapters", "all" or "streamed" (adapters, on a stream); ROWS is the batch size of a device, and MICRO the
number of micro-batches. Prints JSON: the losses, the evaluation's losses, the sum of the trained weights' magnitudes,
and the imbalance. It may be one of several processes, see `jaxpack.initialize_distributed`.
"""

import json
import sys

import numpy as np
from flax import nnx
from models import random_documents, small_model

import torch_bridge
from jaxpack import LoraConfig, TrainConfig, Trainer, initialize_distributed
from jaxpack.model.weights import TRAINED
from jaxpack.parallel.device import on_host

DOCUMENTS = random_documents([17, 40, 3, 31, 9, 28, 5, 64, 70, 80, 55, 33] * 12)


def trainer_of(kind: str, mesh: str, rows: int, micro: int, output: str | None, checkpoint: str | None) -> Trainer:
    config = TrainConfig(
        mesh=mesh,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=micro,
        packing=True,
        streaming=kind == "streamed",
        max_length=128,
        max_steps=4,
        save_steps=2,
        save_total_limit=4,
        learning_rate=1e-2,
        remat="full",
        output_dir=output,
        resume_from_checkpoint=checkpoint,
        compilation_cache_dir="none",
    )
    model = small_model("qwen3", lora=LoraConfig(r=8, lora_dropout=0.2) if kind != "all" else None)
    return Trainer(model, None, DOCUMENTS, config, eval_dataset=DOCUMENTS[:20])


if __name__ == "__main__":
    initialize_distributed()
    kind, mesh, rows, micro, *folders = sys.argv[1:]
    output, checkpoint, *_ = [*folders, None, None]
    trainer = trainer_of(kind, mesh, int(rows), int(micro), output, checkpoint)
    result = trainer.train()
    if output is not None:
        if kind != "all":
            torch_bridge.save_merged(trainer.model, f"{output}/written", dtype="float32")
        else:
            torch_bridge.save_pretrained(trainer.model, f"{output}/written")
    weights = [on_host(leaf.get_value()) for _, leaf in nnx.to_flat_state(nnx.state(trainer.model, TRAINED))]
    print()
    print(
        json.dumps(
            {
                "losses": result.losses.tolist(),
                "evaluations": list(result.evaluations.values()),
                "weights": float(sum(np.abs(x, dtype=np.float64).sum() for x in weights)),
                "imbalance": getattr(trainer.batches, "imbalance", None),  # a stream does not know it
            }
        )
    )
