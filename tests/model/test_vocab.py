"""Tests that a resized vocabulary keeps old rows, gives new ones their mean, and is trained, resumed and generated."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import random_documents, small_model
from tokenizers_for_tests import small_tokenizer

import torch_bridge
from jaxpack import InputError, LoraConfig, TrainConfig, Trainer, add_lora, generate, load_documents, resize_vocab
from jaxpack.kernels.host_weight import HostMatrix
from jaxpack.model.transformer import Transformer
from jaxpack.model.vocab import rows_for
from jaxpack.model.weights import Frozen, freeze, is_trained, move_to_host, weight_of

WHOLE = LoraConfig(r=2, target_modules="q_proj", modules_to_save="embed_tokens,lm_head")
NAMES = {"qwen3": ("embedding",), "llama": ("embedding", "lm_head")}


def bits(model: Transformer, name: str) -> np.ndarray:
    weight = weight_of(getattr(model, name))
    return np.asarray(weight.dense(weight.dtype))


def prepared(kind: str, family: str, dtype: Any = jnp.float32) -> Transformer:
    """Makes a model in one of the forms that a user resizes."""
    model = small_model(family, dtype=dtype)
    if kind == "adapters":
        add_lora(model, LoraConfig(r=2))
    elif kind == "whole":
        add_lora(model, WHOLE)
    elif kind == "host":
        freeze(model)
        move_to_host(model, embedding=True)
    return model


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kind", ["plain", "adapters", "whole", "host"])
def test_old_rows_stay_and_new_rows_are_their_mean(family: str, kind: str, dtype: Any):
    model = prepared(kind, family, dtype)
    before = {name: bits(model, name) for name in NAMES[family]}
    kinds = {name: (type(getattr(model, name)), type(getattr(model, name).get_value())) for name in NAMES[family]}
    assert resize_vocab(model, 101) is model
    assert model.config.vocab_size == 101
    for name, old in before.items():
        new = bits(model, name)
        assert (new.shape, new.dtype) == ((101, old.shape[1]), old.dtype)
        np.testing.assert_array_equal(new[:97].view(np.uint8), old.view(np.uint8))
        mean = old.astype(np.float64).mean(axis=0)
        rounding = np.abs(mean) * float(jnp.finfo(dtype).eps) + 1e-8
        assert (np.abs(new[97:].astype(np.float64) - mean) <= rounding).all()
        variable = getattr(model, name)
        assert (type(variable), type(variable.get_value())) == kinds[name]
    assert model.logits(jnp.array([[1, 100]])).shape == (1, 2, 101)
    assert hasattr(model, "lm_head") == (family == "llama")


def test_documents_of_old_tokens_have_the_same_hidden_states(family: str):
    model, tokens = small_model(family), jnp.arange(20)[None]
    before = model.logits(tokens)
    np.testing.assert_allclose(resize_vocab(model, 101).logits(tokens)[..., :97], before, rtol=0, atol=1e-6)


def test_a_tokenizer_allows_fewer_rows_but_not_too_few():
    tokenizer: Any = small_tokenizer()
    model = small_model("llama", vocab_size=400)
    tokenizer.add_tokens(["<one>", "<two>"])
    needed = rows_for(tokenizer)
    assert needed == len(tokenizer)
    with pytest.raises(InputError, match=rf"`size` must be at least {needed}, .* each token .* got {needed - 1}.*Pass"):
        resize_vocab(model, needed - 1, tokenizer=tokenizer)
    with pytest.raises(
        InputError, match=r"`size` must be at least 400, .* unless `tokenizer` is given, got 399.*leave"
    ):
        resize_vocab(model, 399)
    assert model.config.vocab_size == 400
    before = bits(model, "lm_head")
    resize_vocab(model, needed, tokenizer=tokenizer, pad_to_multiple_of=8)
    assert model.config.vocab_size == -(-needed // 8) * 8
    np.testing.assert_array_equal(bits(model, "lm_head"), before[: model.config.vocab_size])
    assert resize_vocab(model, model.config.vocab_size) is model


@pytest.mark.parametrize("wrong", [0, -1, 2.5, "101", True, None], ids=repr)
def test_a_size_that_is_no_number_of_rows_is_refused(wrong: Any):
    with pytest.raises(InputError, match="`size` must be a whole number of at least 1"):
        resize_vocab(small_model("llama"), wrong)
    if wrong is not None:
        with pytest.raises(InputError, match="`pad_to_multiple_of` must be a whole number of at least 1"):
            resize_vocab(small_model("llama"), 101, pad_to_multiple_of=wrong)


def test_a_token_beyond_the_vocabulary_is_refused_with_the_way_out():
    with pytest.raises(InputError, match=r"Token ids must be in \[0, 97\).*got 98 .*resize_vocab.*--resize-vocab"):
        load_documents([{"input_ids": [1, 98]}], None, vocab_size=97)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_models_from_files_are_resized(lazy: bool, load_in_4bit: bool, tmp_path: Path):
    changes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
    torch_bridge.save_pretrained(small_model("llama", **changes), tmp_path / "model")

    def read() -> Transformer:
        return torch_bridge.from_pretrained(
            str(tmp_path / "model"), dtype="float32", lazy=lazy, load_in_4bit=load_in_4bit
        )[0]

    model, base = read(), read()
    resize_vocab(model, 104)
    base.read_weights()
    for name in NAMES["llama"]:
        np.testing.assert_array_equal(bits(model, name)[:97], bits(base, name))
    assert isinstance(model.lm_head, Frozen) == load_in_4bit
    add_lora(model, WHOLE)
    assert is_trained(model.lm_head)
    torch_bridge.save_adapter(model, tmp_path / "adapter")
    loaded = torch_bridge.load_adapter(read(), str(tmp_path / "adapter"))
    tokens = jnp.array([[5, 103, 7]])
    np.testing.assert_array_equal(loaded.logits(tokens), model.logits(tokens))


def runs(model: Transformer, **settings: Any) -> Trainer:
    rows = random_documents([20] * 8, vocab_size=101)
    config = TrainConfig(max_length=32, per_device_train_batch_size=4, learning_rate=1e-2, **settings)
    return Trainer(model, None, rows, config)


def test_new_rows_are_trained_resumed_and_read_from_checkpoints(family: str, tmp_path: Path):
    settings = {"max_steps": 2, "save_steps": 1, "output_dir": str(tmp_path / "run")}

    def model() -> Transformer:
        return add_lora(resize_vocab(small_model(family), 101), WHOLE)

    first = runs(model(), **settings)
    start = bits(first.model, "embedding")
    losses = first.train().losses
    seen = [token for token in np.unique(first.documents.tokens) if token >= 97]
    assert len(seen) >= 3
    assert (bits(first.model, "embedding") != start)[seen].any(axis=1).all()
    again = runs(model(), **settings | {"output_dir": None}, resume_from_checkpoint=str(tmp_path / "run/checkpoints/1"))
    np.testing.assert_array_equal(again.train().losses, losses)
    np.testing.assert_array_equal(bits(again.model, "embedding"), bits(first.model, "embedding"))
    other = add_lora(resize_vocab(small_model(family), 104), WHOLE)
    with pytest.raises(InputError, match=r"`vocab_size` 101 \(here 104\)"):
        runs(other, max_steps=2, resume_from_checkpoint=str(tmp_path / "run/checkpoints/1")).train()
    loaded = torch_bridge.load_adapter(small_model(family), str(tmp_path / "run/checkpoints/latest"))
    assert loaded.config.vocab_size == 101
    tokens = jnp.array([[5, 100, 7]])
    np.testing.assert_array_equal(loaded.logits(tokens), first.model.logits(tokens))
    (written,) = generate(loaded, [[100, 99]], max_new_tokens=3)
    assert all(0 <= token < 101 for token in written)


def test_adapters_alone_are_trained_beside_new_rows(tmp_path: Path):
    """The rows are frozen, and the adapter's folder holds them, since a base model in other hands does not."""
    model = add_lora(resize_vocab(small_model("llama"), 101), LoraConfig(r=2))
    runs(model, max_steps=1).train()
    assert not isinstance(model.embedding, nnx.Param)
    torch_bridge.save_adapter(model, tmp_path / "adapter")
    loaded = torch_bridge.load_adapter(small_model("llama"), str(tmp_path / "adapter"))
    assert loaded.lora_config is not None
    assert loaded.lora_config.modules_to_save == ()
    tokens = jax.random.randint(jax.random.key(0), (1, 12), 0, 101)
    np.testing.assert_array_equal(loaded.logits(tokens), model.logits(tokens))


def test_an_embedding_in_host_memory_is_resized_there():
    model = prepared("host", "llama")
    resize_vocab(model, 101)
    assert isinstance(model.embedding.get_value(), HostMatrix)
    assert isinstance(model.lm_head.get_value(), HostMatrix)
