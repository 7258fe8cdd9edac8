"""Tests how the matrices of experts are read and written: one by one, all of a layer in one tensor, and in 4 bits."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import small_config, small_model
from safetensors.numpy import load_file, save_file

import torch_bridge
from jaxpack import InputError, LoraConfig, add_lora
from jaxpack.kernels.host_weight import HostWeight
from jaxpack.model.lora import adapters
from jaxpack.model.moe import experts_of
from jaxpack.model.nf4 import NF4Weight, quantize_nf4
from jaxpack.model.weights import move_to_host, weight_of
from torch_bridge.io.experts import Cut, fuse_experts, fused_shapes, split_experts
from torch_bridge.tensors import model_tensors, tensor_shapes

WEIGHTS = "model.safetensors"
both_families = pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])


def cut(whole: np.ndarray, part: Cut) -> np.ndarray:
    one = whole[part.expert]
    return (one.T if part.is_transposed else one)[part.rows]


def arrays(model) -> dict[str, np.ndarray]:
    return {name: np.asarray(tensor) for name, tensor in model_tensors(model)}


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@both_families
def test_a_written_folder_is_read_back_to_the_bit(family, tmp_path):
    model = small_model(family)
    torch_bridge.save_pretrained(model, tmp_path / "model")
    names = load_file(tmp_path / "model" / WEIGHTS).keys()
    fused = [name for name in names if "experts.gate_up_proj" in name]
    assert bool(fused) == (family == "gpt_oss")
    read, _ = torch_bridge.from_pretrained(tmp_path / "model", dtype="float32")
    assert arrays(read).keys() == arrays(model).keys()
    for name, tensor in arrays(model).items():
        np.testing.assert_array_equal(arrays(read)[name], tensor, err_msg=name)


def test_all_experts_in_one_tensor_are_those_of_their_own_tensors():
    """The two functions are inverse; which of them has the right layout, transformers says in other tests."""
    model = small_model("gpt_oss")
    single = arrays(model)
    fused = dict(fuse_experts(single.items()))
    assert {name: np.shape(tensor) for name, tensor in fused.items()} == fused_shapes(tensor_shapes(model))
    assert list(fused) == list(fused_shapes(tensor_shapes(model)))
    D, F, E = model.config.hidden_size, model.config.moe_intermediate_size, model.config.num_experts
    assert np.shape(fused["model.layers.1.mlp.experts.gate_up_proj"]) == (E, D, 2 * F)
    assert np.shape(fused["model.layers.1.mlp.experts.down_proj_bias"]) == (E, D)
    again = split_experts(fused, cut)
    assert again.keys() == single.keys()
    for name, tensor in single.items():
        np.testing.assert_array_equal(again[name], tensor, err_msg=name)


def test_a_file_may_hold_all_experts_in_one_tensor(tmp_path):
    """transformers 5 holds gate above up in memory, and a user may have saved that."""
    model = small_model("qwen3_moe")
    torch_bridge.save_pretrained(model, tmp_path / "model")
    tensors, config = load_file(tmp_path / "model" / WEIGHTS), model.config
    for layer in range(config.num_layers):
        experts = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            np.stack([tensors.pop(f"{experts}.{e}.{name}.weight") for e in range(config.num_experts)])
            for name in ("gate_proj", "up_proj", "down_proj")
        )
        tensors |= {f"{experts}.gate_up_proj": np.concatenate([gate, up], axis=1), f"{experts}.down_proj": down}
    save_file(tensors, tmp_path / "model" / WEIGHTS)
    read, _ = torch_bridge.from_pretrained(tmp_path / "model", dtype="float32")
    for name, tensor in arrays(model).items():
        np.testing.assert_array_equal(arrays(read)[name], tensor, err_msg=name)


def test_each_projection_of_each_expert_is_quantised_on_its_own(tmp_path):
    model = small_model("qwen3_moe")
    torch_bridge.save_pretrained(model, tmp_path / "model")
    read, _ = torch_bridge.from_pretrained(tmp_path / "model", dtype="float32", load_in_4bit=True)
    for ours, dense in zip(experts_of(read), experts_of(model), strict=True):
        weight, rows = weight_of(ours.weight), [size for _, size in dense.projections]
        assert isinstance(weight, NF4Weight)
        for layer in range(model.config.num_layers):
            matrix, first = dense.weight[...][layer], 0
            for size in rows:
                part = matrix[first : first + size]
                alone = quantize_nf4(part, (size,)).dense(jnp.float32)
                np.testing.assert_array_equal(weight.at(layer).dense_rows(first, size, jnp.float32), alone)
                first += size
    router = read.blocks.feed_forward.router.weight.get_value()
    assert not isinstance(router, NF4Weight)


@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_experts_in_host_memory_give_the_same_logits(load_in_4bit, tmp_path):
    torch_bridge.save_pretrained(small_model("gpt_oss"), tmp_path / "model")
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 97, (2, 40)))
    model, _ = torch_bridge.from_pretrained(tmp_path / "model", dtype="float32", load_in_4bit=load_in_4bit)
    add_lora(model, LoraConfig(r=4, target_parameters="down_proj"))
    before = np.asarray(model.logits(tokens))
    move_to_host(model, layers=True)
    for module in experts_of(model):
        assert isinstance(weight_of(module.weight), HostWeight)
    np.testing.assert_allclose(model.logits(tokens), before, rtol=0, atol=1e-6)


@both_families
def test_an_adapter_on_experts_is_read_back_to_the_bit(family, tmp_path):
    model = add_lora(small_model(family), LoraConfig(r=3, target_parameters="mlp.experts.gate_up_proj,down_proj"))
    for number, adapter in enumerate(adapters(model).values()):
        adapter.lora_b.set_value(jax.random.normal(jax.random.key(number), adapter.lora_b.shape))
    torch_bridge.save_adapter(model, tmp_path / "adapter")
    read = torch_bridge.load_adapter(small_model(family), str(tmp_path / "adapter"))
    assert read.lora_config.target_parameters == ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    for one, other in zip(jax.tree.leaves(nnx.state(read)), jax.tree.leaves(nnx.state(model)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_experts_of_some_layers_have_adapters(tmp_path):
    parameters = ("layers.1.mlp.experts.gate_up_proj", "down_proj")
    model = add_lora(small_model("qwen3_moe"), LoraConfig(r=3, target_modules="q_proj", target_parameters=parameters))
    assert adapters(model)["mlp.experts.gate_up_proj"].layers == (1,)
    torch_bridge.save_adapter(model, tmp_path / "adapter")
    # In a layer where both matrices have adapters, PEFT wraps the first within the second.
    modules = {name.split(".layers.")[1] for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors")}
    of_experts = {"0.mlp.experts", "1.mlp.experts", "1.mlp.experts.base_layer"}
    assert {name.split(".lora_")[0] for name in modules if "experts" in name} == of_experts
    read = torch_bridge.load_adapter(small_model("qwen3_moe"), str(tmp_path / "adapter"))
    for one, other in zip(jax.tree.leaves(nnx.state(read)), jax.tree.leaves(nnx.state(model)), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_parameters": ["gate.weight"]}, r"`target_parameters` of .* must be among .* got gate\.weight"),
        ({"target_parameters": "down_proj"}, "`target_parameters` of .* must be a list of names, got 'down_proj'"),
        ({"target_parameters": [7]}, "`target_parameters` of .* must be a list of names"),
        ({"target_parameters": [], "target_modules": []}, "`target_modules` of .* must be a list of module names"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "must hold the tensors that adapter_config.json describes"),
        ({"lora_dropout": 0.1}, "`lora_dropout` must be 0 with `target_parameters`"),
    ],
)
def test_a_wrong_adapter_config_is_refused_by_name(changes, message, tmp_path):
    lora = LoraConfig(r=2, target_modules=(), target_parameters="gate_up_proj,down_proj")
    torch_bridge.save_adapter(add_lora(small_model("qwen3_moe"), lora), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(InputError, match=message):
        torch_bridge.load_adapter(small_model("qwen3_moe"), str(tmp_path / "adapter"))


def test_names_by_their_ends_are_resolved_everywhere():
    lora = LoraConfig(r=2, target_parameters="down_proj", rank_pattern="down_proj=4", alpha_pattern="q_proj=3")
    model = add_lora(small_model("qwen3_moe"), lora)
    assert adapters(model)["mlp.experts.down_proj"].lora_a.shape[2] == 4
    assert model.lora_config.target_parameters == ("mlp.experts.down_proj",)
    assert model.lora_config.rank_pattern == (("mlp.experts.down_proj", 4),)


def test_a_projection_of_an_expert_is_no_target_module():
    """The most likely mistake: the names of a dense model's projections."""
    with pytest.raises(InputError, match=r"got \['down_proj', 'up_proj'\]\. `target_parameters` names the experts'"):
        add_lora(small_model("qwen3_moe"), LoraConfig(target_modules="q_proj,up_proj,down_proj"))


def test_an_adapter_for_each_expert_is_refused_with_a_way_out(tmp_path):
    torch_bridge.save_adapter(add_lora(small_model("qwen3_moe"), LoraConfig(r=2)), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    name = "base_model.model.model.layers.0.mlp.experts.0.gate_proj.lora_A.weight"
    save_file(load_file(path) | {name: np.zeros((2, 48), np.float32)}, path)
    with pytest.raises(InputError, match=r"an adapter for each projection of each expert.*`merge_and_unload`"):
        torch_bridge.load_adapter(small_model("qwen3_moe"), str(tmp_path / "adapter"))


@pytest.mark.parametrize("shape", [(2, 0, 4), (0, 4, 4), (2, 2, 0), (10**6, 2, 0)], ids=str)
def test_a_tensor_of_all_experts_without_numbers_is_no_tensor_of_any(shape):
    fused = {"model.layers.0.mlp.experts.down_proj": np.broadcast_to(np.float32(0), shape)}
    assert list(split_experts(fused, cut)) == list(fused)


@pytest.mark.parametrize("shape", [(), (7,), (4, 2, 16)], ids=str)
def test_a_tensor_named_like_codes_is_ignored_as_any_other(shape, tmp_path):
    torch_bridge.save_pretrained(small_model("qwen3"), tmp_path / "model")
    tensors = load_file(tmp_path / "model" / WEIGHTS)
    tensors["model.layers.0.self_attn.q_proj.weight_blocks"] = np.zeros(shape, np.uint8)
    tensors["model.layers.0.self_attn.q_proj.weight_scales"] = np.zeros(shape[:2], np.uint8)
    save_file(tensors, tmp_path / "model" / WEIGHTS)
    model, _ = torch_bridge.from_pretrained(tmp_path / "model", dtype="float32")
    assert model.config.num_layers == 2


def test_an_adapter_on_experts_of_another_model_is_refused(tmp_path):
    lora = LoraConfig(r=2, target_parameters="down_proj")
    torch_bridge.save_adapter(add_lora(small_model("qwen3_moe"), lora), tmp_path / "adapter")
    with pytest.raises(InputError, match=r"`target_parameters` of .* must be empty, because the model has no experts"):
        torch_bridge.load_adapter(small_model("qwen3"), str(tmp_path / "adapter"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 10**9}, "`num_experts` must be at most 10,000, got 1000000000"),
        ({"num_experts": 9_999}, "`num_experts` must be at most .* the number of tensors"),
        ({"num_hidden_layers": 40, "num_experts": 40}, "`num_experts` must be at most 1, the number of tensors"),
        ({"num_experts": 7}, "missing tensors"),
        ({"moe_intermediate_size": 10**9}, "`moe_intermediate_size` must be at most .* the largest dimension"),
        ({"moe_intermediate_size": 31}, "of the wrong shape"),
    ],
)
def test_a_config_with_other_experts_than_the_weights_is_refused(changes, message, tmp_path):
    torch_bridge.save_pretrained(small_model("qwen3_moe"), tmp_path / "model")
    change_config(tmp_path / "model", **changes)
    with pytest.raises(InputError, match=message):
        torch_bridge.from_pretrained(tmp_path / "model")


def test_the_bias_of_a_projection_is_refused_with_experts():
    with pytest.raises(InputError, match="`mlp_bias` must be False with experts, got True"):
        small_config("qwen3_moe", mlp_bias=True)
