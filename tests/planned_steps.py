"""Provides the models that predictions are tested on (shapes without arrays) and the runs that were measured."""

import functools

from measured_runs import measured_runs

from jaxpack import LoraConfig, Transformer
from jaxpack.bench import models
from jaxpack.model.presets import SHAPES
from jaxpack.planning.cards import CARDS, card_named

H200 = card_named("H200").rates
GIB = 2**30
LORA = LoraConfig(r=16)
# Keys that an average token of Alpaca attends to: the mean over documents, weighted by their tokens.
KEYS_PER_TOKEN = 80
PACKED_RUNS = [row for card in CARDS if card.measured for row in measured_runs(card.name, layout="packed")]
PADDING_FREE_RUNS = measured_runs(layout="padding-free")


@functools.cache
def abstract_model(name: str, lora: LoraConfig | None) -> Transformer:
    return models.abstract_model(SHAPES[name], lora)


def model_of(row: dict) -> Transformer:
    return abstract_model(row["model"], None if row["full_finetuning"] else LORA)
