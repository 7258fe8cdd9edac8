"""Tests that a checkpoint is an adapter: what it holds, which one a name means, and what is refused."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from models import random_documents, small_model

import torch_bridge
from jaxpack.errors import InputError
from jaxpack.model.lora import add_lora
from jaxpack.model.weights import TRAINED
from jaxpack.settings import LoraConfig, TrainConfig
from jaxpack.train.trainer import Trainer

LORA = LoraConfig(
    r=4, target_modules="layers.1.self_attn.q_proj,down_proj", rank_pattern="q_proj=2", use_rslora=True, use_dora=True
)
DOCUMENTS = random_documents([17, 40, 3, 31, 9, 28, 5, 64, 70, 80, 55, 33])


def base(name: str = "org/base", **changed):
    model = small_model("qwen3")
    model.config = dataclasses.replace(model.config, name_or_path=name, **changed)
    return model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = TrainConfig(
        output_dir=str(folder),
        packing=True,
        max_length=128,
        per_device_train_batch_size=1,
        max_steps=6,
        save_steps=2,
        save_total_limit=9,
        learning_rate=0.05,  # so large that the evaluation gets worse after a while
        remat="full",
    )
    trainer = Trainer(add_lora(base(), LORA), None, DOCUMENTS[:4], config, DOCUMENTS[4:])
    return folder, trainer, trainer.train()


def trained(model) -> dict[str, np.ndarray]:
    return {str(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(nnx.state(model, TRAINED))}


def test_the_latest_checkpoint_holds_the_adapter_that_the_run_ended_with(run):
    folder, trainer, _ = run
    for name in ("latest", "6"):
        model = torch_bridge.load_adapter(base(), str(folder / "checkpoints" / name))
        assert (model.lora_config.rank_of("q_proj"), model.lora_config.rank_of("down_proj")) == (2, 4)
        assert model.lora_config.scaling_of("down_proj") == trainer.model.lora_config.scaling_of("down_proj")
        found, expected = trained(model), trained(trainer.model)
        assert found.keys() == expected.keys()
        for path, array in expected.items():
            np.testing.assert_array_equal(found[path], array)


def test_the_best_checkpoint_is_that_with_the_lowest_evaluation_loss(run):
    folder, _, result = run
    best = min(result.evaluations, key=result.evaluations.__getitem__)
    assert best != max(result.evaluations)  # Otherwise this test shows nothing.
    found, expected = (
        trained(torch_bridge.load_adapter(base(), str(folder / "checkpoints" / name))) for name in ("best", str(best))
    )
    for path, array in expected.items():
        np.testing.assert_array_equal(found[path], array)


def test_a_checkpoint_names_the_base_of_its_run(run):
    assert torch_bridge.base_of(str(run[0] / "checkpoints" / "best")) == "org/base"


def test_a_checkpoint_is_no_adapter_of_another_model(run):
    with pytest.raises(
        InputError, match=r"`model` must be the base of .*, whose `num_kv_heads` is \d, got a model with"
    ):
        torch_bridge.load_adapter(base(num_kv_heads=1), str(run[0] / "checkpoints" / "latest"))


def test_a_damaged_checkpoint_is_refused(run, tmp_path):
    shutil.copytree(run[0] / "checkpoints", tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / "6" / "SHA256SUMS").unlink()
    with pytest.raises(
        InputError, match=r"`adapter` must be a whole checkpoint, .* damaged: .*The one before it, .*4'"
    ):
        torch_bridge.load_adapter(base(), str(tmp_path / "checkpoints" / "latest"))


def test_a_checkpoint_of_all_weights_is_no_adapter(tmp_path):
    config = TrainConfig(output_dir=str(tmp_path), max_length=128, max_steps=1, remat="full", packing=True)
    Trainer(base(), None, DOCUMENTS, config).train()
    with pytest.raises(InputError, match="must be a checkpoint of a run with adapters"):
        torch_bridge.load_adapter(base(), str(tmp_path / "checkpoints" / "latest"))
    with pytest.raises(InputError, match="must be a checkpoint with an evaluation loss"):
        torch_bridge.load_adapter(base(), str(tmp_path / "checkpoints" / "best"))
    with pytest.raises(InputError, match="there is no checkpoint there"):
        torch_bridge.load_adapter(base(), str(tmp_path / "other" / "checkpoints" / "best"))
