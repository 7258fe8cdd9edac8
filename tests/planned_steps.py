"""Provides the models that predictions are tested on (shapes without arrays) and the runs that were measured."""

import functools

from measured_runs import measured_runs

from jaxpack import LoraConfig, Transformer
from jaxpack.bench import models
from jaxpack.model.presets import SHAPES
from jaxpack.planning.time import RATES

H200 = RATES["H200"]
GIB = 2**30
LORA = LoraConfig(r=16)
# Keys that an average token of Alpaca attends to: the mean over documents, weighted by their tokens.
KEYS_PER_TOKEN = 80
PACKED_RUNS = [row for gpu in RATES for row in measured_runs(gpu, layout="packed")]
PADDING_FREE_RUNS = measured_runs(layout="padding-free")


@functools.cache
def abstract_model(name: str, lora: LoraConfig | None) -> Transformer:
    return models.abstract_model(SHAPES[name], lora)


def model_of(row: dict) -> Transformer:
    return abstract_model(row["model"], None if row["full_finetuning"] else LORA)
