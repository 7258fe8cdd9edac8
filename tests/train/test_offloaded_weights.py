"""Tests that a run with frozen weights in the host's memory is the run with weights on the device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import random_documents, small_model

import torch_bridge
from jaxpack import InputError, LogProbObjective, LoraConfig, TrainConfig, Trainer, add_lora, generate
from jaxpack.kernels import host_weight
from jaxpack.kernels.host_weight import HostMatrix, HostWeight
from jaxpack.model.nf4 import nf4_store
from jaxpack.model.weights import Frozen, freeze, movable, move_to_host, split_trained
from jaxpack.parallel.host_memory import is_pinned
from jaxpack.planning.choose import Choice
from jaxpack.train.run import Run
from jaxpack.utils.compilation_cache import ProgramCache

OPTIONS = {"max_length": 128, "per_device_train_batch_size": 2, "max_steps": 3, "learning_rate": 1e-2, "packing": True}
DOCUMENTS = [60, 50, 40, 30, 20]
PLACES = {
    "layers": {"offload_weights": True},
    "embedding": {"offload_embedding": True},
    "both": {"offload_weights": True, "offload_embedding": True},
}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(host_weight, "_PIECE_BYTES", 128 * 48 * 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "model"
    torch_bridge.save_pretrained(small_model("qwen3"), path)
    return str(path)


def read(folder: str, **options):
    model, _ = torch_bridge.from_pretrained(folder, dtype="float32", **options)
    return add_lora(model, LoraConfig(r=4))


def trained(model, **changes):
    config = TrainConfig(**OPTIONS | {"remat": "offload"} | changes)
    return Trainer(model, None, random_documents(DOCUMENTS), config).train()


def adapters_of(model):
    return jax.tree.leaves(split_trained(model)[1])


def pinned_arrays(model) -> int:
    return sum(map(is_pinned, jax.tree.leaves(nnx.state(model, Frozen))))


@pytest.mark.one_in(6)
@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("load_in_4bit", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_a_run_is_the_same_wherever_its_frozen_weights_lie(folder, place, load_in_4bit, lazy):
    resident = read(folder, load_in_4bit=load_in_4bit)
    want = trained(resident).losses
    moved = read(folder, load_in_4bit=load_in_4bit, lazy=lazy)
    got = trained(moved, **PLACES[place]).losses
    assert pinned_arrays(moved) > 0
    assert pinned_arrays(resident) == 0
    if place == "layers":
        np.testing.assert_array_equal(got, want)
        # A GPU gives the same bits (`test_on_gpu.py`). A CPU's matmuls depend on where an operand begins in memory.
        close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
        jax.tree.map(close, adapters_of(moved), adapters_of(resident))
    else:  # The loss adds up in another order.
        np.testing.assert_allclose(got, want, rtol=1e-5)
    tokens = jnp.arange(12)[None]
    np.testing.assert_allclose(moved.logits(tokens), resident.logits(tokens), rtol=1e-2, atol=1e-2)


def test_weights_that_were_read_into_host_memory_are_those_of_the_files(folder, tmp_path):
    model = read(folder, lazy=True)
    move_to_host(model, layers=True, embedding=True)
    model.read_weights()
    want = read(folder)
    for one in (model, want):  # adapters that change the model
        nnx.update(one, jax.tree.map(lambda x: x + 0.1, split_trained(one)[1]))
    tokens = jnp.arange(12)[None]
    np.testing.assert_allclose(model.logits(tokens), want.logits(tokens), rtol=1e-5, atol=1e-5)
    assert generate(model, [[3, 4]], max_new_tokens=3) == generate(want, [[3, 4]], max_new_tokens=3)
    torch_bridge.save_merged(model, tmp_path / "merged")
    torch_bridge.save_merged(want, tmp_path / "wanted")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "wanted" / name).read_bytes()


def test_a_run_resumes_wherever_its_weights_lie_now(folder, tmp_path, monkeypatch):
    options = {"output_dir": str(tmp_path / "run"), "save_steps": 2, "max_steps": 4}
    straight = trained(read(folder), max_steps=4).losses

    class Stopped(Exception):
        pass

    def stop(run, batch, step=Run.step):
        if run.started == 2:
            raise Stopped
        return step(run, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "step", stop)
        model = read(folder)
        with pytest.raises(Stopped):
            trained(model, **options)
    resumed = trained(read(folder, lazy=True), **options, offload_weights=True, resume_from_checkpoint="latest")
    # A CPU's compiler fuses the two programs in its own way. `tests/model/test_offload.py` compares bits on a GPU.
    np.testing.assert_allclose(resumed.losses, straight, rtol=1e-6)


@pytest.mark.slow
def test_an_evaluation_reads_weights_in_host_memory(folder):
    def loss(**changes):
        documents, config = random_documents(DOCUMENTS), TrainConfig(**OPTIONS | {"remat": "offload"} | changes)
        trainer = Trainer(read(folder), None, documents, config, eval_dataset=documents)
        run = Run(trainer.model, trainer.batches, config, trainer.eval_batches)
        run.compile(ProgramCache("none"))
        return run.evaluate()[""]["loss"]

    want = loss()
    assert loss(**PLACES["layers"]) == want
    assert loss(**PLACES["both"]) == pytest.approx(want, rel=1e-5)


@pytest.mark.slow
def test_dropout_and_accumulation_are_the_same(folder):
    def losses(**changes):
        model, _ = torch_bridge.from_pretrained(folder, dtype="float32")
        model = add_lora(model, LoraConfig(r=4, lora_dropout=0.2))
        changes |= {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}
        return trained(model, **changes).losses

    # Two programs for a CPU, which may fuse the masks' arithmetic in two ways.
    np.testing.assert_allclose(losses(**PLACES["layers"]), losses(), rtol=1e-6)


def test_a_run_that_finds_too_little_memory_moves_its_weights(folder, capsys):
    """Tests the next choice: the weights move to the host while the run goes on."""
    model = read(folder)
    documents, config = random_documents(DOCUMENTS), TrainConfig(**OPTIONS | {"remat": "offload"})
    trainer = Trainer(model, None, documents, config)
    run = Run(model, trainer.batches, config)
    run._choices.append(Choice("offload", offload_weights=True, offload_embedding=True))
    run.take_next_choice("a test says so")
    assert "the layers' weights and embedding and head in host memory" in capsys.readouterr().err
    assert pinned_arrays(model) == len([leaf for leaf in jax.tree.leaves(run.frozen) if is_pinned(leaf)]) > 0


@pytest.mark.parametrize("four_bits", [False, True])
def test_what_moves_and_what_stays(four_bits):
    model = small_model("qwen3")
    if four_bits:
        freeze(model, nf4_store())
    model = add_lora(model, LoraConfig(r=4))
    move_to_host(model, layers=True, embedding=True)
    in_layers, outside = movable(model)
    assert [type(place.value) for place in in_layers] == 4 * [HostWeight]
    assert [type(place.value) for place in outside] == [HostMatrix]
    small = [leaf for leaf in jax.tree.leaves(nnx.state(model.blocks, Frozen)) if not is_pinned(leaf)]
    assert all(leaf.size <= 2 * 256 for leaf in small)  # norms, and tables of 4-bit codes
    before = nnx.state(model)
    move_to_host(model, layers=True, embedding=True)  # nothing more to move
    assert jax.tree.structure(nnx.state(model)) == jax.tree.structure(before)


def test_what_is_trained_stays():
    model = add_lora(small_model("llama"), LoraConfig(r=4, modules_to_save=("embed_tokens", "lm_head")))
    assert movable(model)[1] == []
    assert movable(small_model("qwen3")) == ([], [])
    config = TrainConfig(**OPTIONS, remat="offload", offload_weights=True)
    trainer = Trainer(small_model("qwen3"), None, random_documents(DOCUMENTS), config)
    with pytest.raises(InputError, match='`offload_weights` must be "auto" or "off" for this model, got "on"'):
        trainer.train()


def test_too_little_host_memory_is_refused(folder, monkeypatch):
    monkeypatch.setattr("jaxpack.planning.choose.available_host_bytes", lambda: 10_000)
    config = TrainConfig(**OPTIONS, remat="offload", offload_weights=True)
    trainer = Trainer(read(folder), None, random_documents(DOCUMENTS), config)
    with pytest.raises(InputError, match="`offload_weights` and `offload_embedding` must ask for what fits"):
        trainer.train()


def test_a_model_whose_weights_have_moved_stays_as_it_is(folder, monkeypatch):
    model = read(folder)
    trained(model, max_steps=1, offload_weights=True)
    for changes, message in (
        ({"remat": "full"}, '`remat` must be "auto", "offload" or "offload_heads", got "full": an earlier run moved'),
        ({"offload_weights": "off"}, '`offload_weights` must be "auto" or "on", got "off": an earlier run moved'),
    ):
        with pytest.raises(InputError, match=message):
            trained(model, **changes)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model, Frozen)) if is_pinned(leaf))
    assert held > 10_000
    needed = 2 * 256 * 48 * 4 * 2  # bytes for the residuals alone
    monkeypatch.setattr("jaxpack.planning.choose.available_host_bytes", lambda: needed)
    trained(model, max_steps=1)


@pytest.mark.slow
def test_a_merge_into_the_original_weights_checks_them_wherever_they_lie(folder, tmp_path):
    moved, resident = (read(folder, load_in_4bit=True) for _ in range(2))
    move_to_host(moved, layers=True, embedding=True)
    for model in (moved, resident):
        nnx.update(model, jax.tree.map(lambda x: x + 0.1, split_trained(model)[1]))
    for model, name in ((moved, "moved"), (resident, "resident")):
        torch_bridge.save_merged(model, tmp_path / name, base=folder)
    written = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("moved", "resident")]
    assert written[0] == written[1]
    other = small_model("qwen3")
    weight = other.blocks.feed_forward.down.weight
    weight.set_value(-weight[...])
    torch_bridge.save_pretrained(other, tmp_path / "other")
    with pytest.raises(InputError, match="`base`"):
        torch_bridge.save_merged(moved, tmp_path / "wrong", base=str(tmp_path / "other"))


def test_a_users_function_gets_the_four_arrays_of_a_batch(folder):
    def loss(log_probs, batch):
        _, _, _, targets = batch
        return -jnp.sum(log_probs), jnp.sum(targets != -100)

    config = TrainConfig(**OPTIONS, remat="offload", offload_embedding=True)
    documents = random_documents(DOCUMENTS)
    got = Trainer(read(folder), None, documents, config, objective=LogProbObjective(loss)).train().losses
    np.testing.assert_allclose(got, trained(read(folder)).losses, rtol=1e-5)


def test_a_choice_says_where_weights_lie():
    both = Choice("offload", offload_weights=True, offload_embedding=True)
    assert str(both) == 'remat "offload", with the layers\' weights and embedding and head in host memory'
    assert both.note == "offload, with the head in pieces"
    assert Choice("offload", offload_weights=True).note == "offload"  # the same bits
    fields = dataclasses.asdict(TrainConfig(offload_weights=True, offload_embedding=False))
    assert (fields["offload_weights"], fields["offload_embedding"]) == ("on", "off")
