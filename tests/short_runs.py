"""Provides settings and dataset rows for runs of a few steps."""

import numpy as np

from jaxpack.settings import LoraConfig, TrainConfig

LORA = LoraConfig(r=4)
ROWS = [
    {"input_ids": np.random.default_rng(i).integers(0, 97, 2 + 7 * i % 60).tolist(), "labels": None} for i in range(40)
]
SHORT = TrainConfig(max_length=64, packing=True, per_device_train_batch_size=2, max_steps=7, learning_rate=1e-2)


def changed(config: TrainConfig, **changes: object) -> TrainConfig:
    return TrainConfig(**(vars(config) | changes))
