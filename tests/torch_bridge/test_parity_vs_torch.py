"""Tests that jaxpack's logits, losses, gradients and training curves are those of transformers and PEFT."""

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from peft import PeftModel
from transformers import get_linear_schedule_with_warmup

import torch_bridge
from jaxpack import Batches, Documents, LoraConfig, PackedBatch, TrainConfig, Trainer, Transformer, add_lora
from jaxpack.model.lora import adapters
from jaxpack.train.step import loss_and_gradients, split_trainable
from tests.torch_bridge import hf
from torch_bridge.adapter import adapter_tensors
from torch_bridge.tensors import model_tensors

# PEFT calls deprecated functions of transformers.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

# float32 rounds by 6e-8 of the value. Logits of up to 4 accumulate rounding over sums of 20 to 150 terms in two layers:
# we measured 4e-6. Losses, of about 5, are means, in which rounding cancels: 5e-7, one bit.
LOGITS_TOLERANCE = 1e-4
LOSS_TOLERANCE = 1e-5
# |difference| / |value| of one tensor. Gradients are sums over tokens and cancel less than their errors: we measured
# 2e-6. Adam divides by the gradient's size, so weights keep the gradient's relative error: 2e-6 after 20 steps.
GRADIENT_TOLERANCE = 1e-4
WEIGHT_TOLERANCE = 1e-4
# Each step starts from weights that differ by the rounding of all earlier steps: we measured 7e-7, still one bit.
CURVE_MAX_TOLERANCE = 1e-4
CURVE_MEAN_TOLERANCE = 1e-5

LORA = {
    "all-linear": LoraConfig(r=4, lora_alpha=8),
    "subset": LoraConfig(r=4, lora_alpha=8, target_modules=("q_proj", "v_proj", "down_proj")),
    "rslora": LoraConfig(r=4, lora_alpha=8, use_rslora=True),
    "layers": LoraConfig(r=4, lora_alpha=8, target_modules=r".*\.(0\..*\.[qo]_proj|1\..*\.(up|q)_proj)"),
    "experts": LoraConfig(r=4, lora_alpha=8, target_parameters=("gate_up_proj", "down_proj")),
}
LAYOUTS = {
    "packed": {"packing": True, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "padding-free": {"per_device_train_batch_size": 8},
    "padded": {"padding_free": False, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
}


def with_lora(folder: str, config: LoraConfig) -> Transformer:
    """Loads the checkpoint with adapters whose B is not zero, since the gradient of A would be zero otherwise."""
    model, _ = torch_bridge.from_pretrained(folder, dtype="float32")
    add_lora(model, config)
    for i, adapter in enumerate(adapters(model).values()):
        adapter.lora_b.set_value(0.1 * jax.random.normal(jax.random.key(i), adapter.lora_b.shape))
    return model


def in_peft(model: Transformer, base: torch.nn.Module, folder: Path) -> PeftModel:
    """Returns a PEFT model with the same adapters, ready to train."""
    torch_bridge.save_adapter(model, str(folder))
    return PeftModel.from_pretrained(base, folder, is_trainable=True)


def trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Returns a torch model's trained parameters by their names in a file. A tied head counts as the embedding."""
    return {name.replace(".default.", "."): p for name, p in model.named_parameters() if p.requires_grad}


def tensors_of(model: Transformer) -> dict[str, np.ndarray]:
    """Returns the trained parameters of a jaxpack model by their names in a file."""
    named = adapter_tensors(model) if adapters(model) else dict(model_tensors(model))
    return {name: np.asarray(tensor) for name, tensor in named.items()}


def assert_close(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float) -> None:
    """Compares each tensor by the norm of the difference, relative to the norm of the expected tensor."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        size = np.linalg.norm(tensor)
        assert size > 1e-3, f"{name} is next to nothing: no comparison"
        assert np.linalg.norm(actual[name] - tensor) <= tolerance * size, name


# --- Logits ---


@pytest.mark.parametrize("checkpoint", hf.CHECKPOINTS)
def test_logits_equal_transformers(checkpoint: str, tmp_path: Path):
    reference, folder = hf.save_model(tmp_path, checkpoint)
    tokens = hf.random_tokens(2, 150)
    assert tokens.shape[1] > 2 * hf.ORIGINAL_CONTEXT
    model, _ = torch_bridge.from_pretrained(folder, dtype="float32")

    expected = hf.logits(reference, tokens)
    assert expected.std() > 0.5  # with tiny logits the tolerance would prove little
    np.testing.assert_allclose(model.logits(jnp.asarray(tokens)), expected, rtol=0, atol=LOGITS_TOLERANCE)


def test_the_llama3_scaling_shows_in_the_logits():
    """The scaling changes logits far beyond the tolerance, so the test above would fail without the scaling."""
    scaled, plain = hf.make_model("llama3-untied"), hf.make_model("llama-untied")
    tokens = hf.random_tokens(2, 150)
    difference = np.abs(hf.logits(scaled, tokens) - hf.logits(plain, tokens)).max(axis=(0, 2))
    assert difference[: hf.ORIGINAL_CONTEXT].max() > 100 * LOGITS_TOLERANCE
    assert difference[hf.ORIGINAL_CONTEXT :].max() > 100 * LOGITS_TOLERANCE


# --- Loss and gradients of one step ---

_DOCUMENTS = hf.random_documents([90, 61, 33, 17, 5, 2, 100])  # 308 tokens: three packed rows of 128


class Step(NamedTuple):
    """Holds the loss of one batch and its gradients by Hugging Face or PEFT name."""

    loss: float
    gradients: dict[str, np.ndarray]


def jaxpack_step(model: Transformer, layout: str, **options: Any) -> Step:
    lengths = np.array([len(document.tokens) for document in _DOCUMENTS])
    documents = Documents(
        np.concatenate([document.tokens for document in _DOCUMENTS]).astype(np.int32),
        np.concatenate([document.labels for document in _DOCUMENTS]).astype(np.int32),
        np.cumsum(lengths) - lengths,
        lengths,
    )
    batches = Batches(documents, TrainConfig(max_length=128, num_train_epochs=1, **LAYOUTS[layout]))
    assert len(batches) == 1
    graph, trainable, frozen = split_trainable(model)
    step = jax.jit(functools.partial(loss_and_gradients, graph, **options))
    loss, gradients = step(trainable, frozen, batches[0])
    # Gradients have the structure of the parameters, and so the names of the parameters.
    return Step(float(loss), tensors_of(nnx.merge(graph, gradients, frozen)))


def torch_step(model: torch.nn.Module, **options: Any) -> Step:
    loss = model(**hf.padded(_DOCUMENTS), **options).loss
    loss.backward()
    return Step(loss.item(), {name: parameter.grad.numpy() for name, parameter in trained(model).items()})


@pytest.fixture(
    scope="module",
    params=[
        ("qwen3-tied", "packed"),
        ("qwen3-untied", "padded"),
        ("llama-tied", "padding-free"),
        ("llama3-untied", "packed"),
    ],
    ids="-".join,
)
def full_steps(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Step, Step]:
    """Computes one full fine-tuning step with jaxpack, and with transformers on the padded documents."""
    checkpoint, layout = request.param
    reference, folder = hf.save_model(tmp_path_factory.mktemp("model"), checkpoint)
    model, _ = torch_bridge.from_pretrained(folder, dtype="float32")
    return jaxpack_step(model, layout), torch_step(reference)


@pytest.fixture(
    scope="module",
    params=[
        ("qwen3-tied", "all-linear"),
        ("qwen3-tied", "rslora"),
        ("llama3-untied", "all-linear"),
        ("llama3-untied", "subset"),
        ("qwen3-tied", "layers"),
    ],
    ids="-".join,
)
def lora_steps(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Step, Step]:
    """Computes one LoRA step with jaxpack on packed documents, and with PEFT on padded documents."""
    checkpoint, lora = request.param
    reference, folder = hf.save_model(tmp_path_factory.mktemp("model"), checkpoint)
    model = with_lora(folder, LORA[lora])
    peft_model = in_peft(model, reference, tmp_path_factory.mktemp("adapter"))
    return jaxpack_step(model, "packed"), torch_step(peft_model)


def test_loss_equals_transformers(full_steps: tuple[Step, Step]):
    actual, expected = full_steps
    assert abs(actual.loss - expected.loss) <= LOSS_TOLERANCE


def test_gradients_of_all_weights_equal_transformers(full_steps: tuple[Step, Step]):
    actual, expected = full_steps
    assert_close(actual.gradients, expected.gradients, GRADIENT_TOLERANCE)


def test_loss_with_lora_equals_peft(lora_steps: tuple[Step, Step]):
    actual, expected = lora_steps
    assert abs(actual.loss - expected.loss) <= LOSS_TOLERANCE


def test_gradients_of_adapters_equal_peft(lora_steps: tuple[Step, Step]):
    actual, expected = lora_steps
    assert_close(actual.gradients, expected.gradients, GRADIENT_TOLERANCE)


@pytest.mark.parametrize("checkpoint", ["qwen3_moe-untied", "gpt_oss-untied"])
def test_the_load_balancing_loss_and_its_gradients_equal_transformers(checkpoint: str, tmp_path: Path):
    reference, folder = hf.save_model(tmp_path, checkpoint)
    model, _ = torch_bridge.from_pretrained(folder, dtype="float32")
    without = jaxpack_step(model, "padding-free")
    actual = jaxpack_step(model, "padding-free", router_aux_loss_coef=0.5)
    reference.router_aux_loss_coef = 0.5
    expected = torch_step(reference, output_router_logits=True)
    assert actual.loss > without.loss + 1  # it is at least the number of a token's experts
    assert abs(actual.loss - expected.loss) <= LOSS_TOLERANCE
    # The experts' matrices have other names in memory.
    names = [name for name in expected.gradients if name in actual.gradients]
    routers = [name for name in names if name.endswith(("gate.weight", "router.weight"))]
    assert len(routers) == reference.config.num_hidden_layers
    assert all(np.abs(actual.gradients[name] - without.gradients[name]).max() > 1e-4 for name in routers)
    assert_close(*({name: step.gradients[name] for name in names} for step in (actual, expected)), GRADIENT_TOLERANCE)


# --- Training curves ---

_STEPS = 20
_TRAIN = {
    "max_steps": _STEPS,
    "max_length": 128,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "linear",
    "warmup_steps": 4,
    "weight_decay": 0.1,
    "adam_beta1": 0.85,
    "adam_beta2": 0.99,
    "adam_epsilon": 1e-7,
    "max_grad_norm": 0.3,
    "logging_steps": 1,
}


def documents_of(batch: PackedBatch) -> Iterator[hf.Document]:
    """Yields the documents in the rows of a batch, with the labels from which the targets were made."""
    for tokens, targets, segments in zip(
        *(array.reshape(-1, array.shape[-1]) for array in (batch.tokens, batch.targets, batch.segment_ids)), strict=True
    ):
        for segment in range(1, segments.max() + 1):
            inside = segments == segment
            yield hf.Document(tokens[inside].tolist(), [-100, *targets[inside].tolist()[:-1]])


def torch_curve(model: torch.nn.Module, steps: list[list[hf.Document]], config: TrainConfig) -> list[dict[str, float]]:
    """Trains the same run in torch, with padded documents and AdamW as the Hugging Face trainer sets it up."""
    parameters = trained(model)
    groups = [
        {"params": [p for name, p in parameters.items() if "norm" not in name], "weight_decay": config.weight_decay},
        {"params": [p for name, p in parameters.items() if "norm" in name], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_epsilon
    )
    schedule = get_linear_schedule_with_warmup(optimizer, int(config.warmup_steps), len(steps))
    model.train()
    records = []
    for documents in steps:
        loss = model(**hf.padded(documents)).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), config.max_grad_norm)
        records.append({"loss": loss.item(), "grad_norm": norm.item(), "learning_rate": schedule.get_last_lr()[0]})
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return records


@pytest.mark.parametrize(
    ("checkpoint", "lora", "layout"),
    [
        ("qwen3-tied", LORA["all-linear"], {"packing": True, "per_device_train_batch_size": 2}),
        pytest.param(
            "llama3-untied",
            LORA["rslora"],
            {"packing": False, "per_device_train_batch_size": 4},
            marks=pytest.mark.slow,
        ),
        (
            "llama-tied",
            None,
            {
                "packing": True,
                "per_device_train_batch_size": 1,
                "gradient_accumulation_steps": 2,
                "learning_rate": 1e-3,
            },
        ),
        ("qwen3_moe-untied", LORA["experts"], {"packing": True, "per_device_train_batch_size": 2}),
        pytest.param(
            "gpt_oss-untied",
            LORA["experts"],
            {"packing": False, "per_device_train_batch_size": 4},
            marks=pytest.mark.slow,
        ),
    ],
    ids=[
        "qwen3-lora-packed",
        "llama3-rslora-padding-free",
        "llama-full-accumulated",
        "qwen3_moe-experts-packed",
        "gpt_oss-experts-padding-free",
    ],
)
def test_training_curve_equals_torch(checkpoint: str, lora: LoraConfig | None, layout: dict, tmp_path: Path):
    reference, folder = hf.save_model(tmp_path / "model", checkpoint)
    model, _ = torch_bridge.from_pretrained(folder, dtype="float32")
    if lora is not None:
        add_lora(model, lora)
        reference = in_peft(model, reference, tmp_path / "adapter")
    documents = hf.random_documents(np.random.default_rng(1).integers(10, 60, 40).tolist(), seed=2)
    rows = [{"input_ids": document.tokens, "labels": document.labels} for document in documents]
    config = TrainConfig(**(_TRAIN | layout), output_dir=str(tmp_path / "run"))
    trainer = Trainer(model, None, rows, config)
    steps = [list(documents_of(trainer.batches[step])) for step in range(_STEPS)]
    epoch = [document for step in steps[: trainer.batches.steps_per_epoch] for document in step]
    # The unpacked documents are the given ones, except for the first label, which is never a target.
    assert sorted(epoch) == sorted(hf.Document(tokens, [-100, *labels[1:]]) for tokens, labels in documents)

    losses = trainer.train().losses
    expected = torch_curve(reference, steps, config)

    difference = np.abs(losses - [record["loss"] for record in expected])
    assert losses[0] - losses[-1] > 0.1, "nothing was learned"
    assert sum(record["grad_norm"] > config.max_grad_norm for record in expected) > 10, "nothing was clipped"
    assert difference.max() <= CURVE_MAX_TOLERANCE
    assert difference.mean() <= CURVE_MEAN_TOLERANCE
    after = {name: parameter.detach().numpy() for name, parameter in trained(reference).items()}
    assert_close(tensors_of(model), after, WEIGHT_TOLERANCE)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for name, tolerance in {"learning_rate": 1e-6, "grad_norm": GRADIENT_TOLERANCE}.items():
        np.testing.assert_allclose([r[name] for r in records], [r[name] for r in expected], rtol=tolerance, atol=1e-9)
