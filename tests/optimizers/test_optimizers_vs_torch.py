"""Tests that the optimizers that `optim` names are those of torch, transformers and PEFT, for all of a model."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from models import small_model

from jaxpack import LoraConfig, TrainConfig
from jaxpack.model.weights import split_trained
from jaxpack.optimizers.matrices import names_of, rows_of, split
from jaxpack.optimizers.optimizer import make_optimizer, state_bytes

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

STEPS = 3
RATE = 1e-2
DECAY = 0.1
LORA = LoraConfig(r=4, target_modules="q_proj,down_proj", modules_to_save=("lm_head",))
MODELS = {  # a family, and adapters or None for all weights
    "adapters": ("llama", LORA),
    "all": ("gpt_oss", None),  # has projections of two sizes in one array, biases, a router and experts
}


class Lion(torch.optim.Optimizer):
    """Computes Lion as in the paper (https://arxiv.org/abs/2302.06675, algorithm 2)."""

    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                state, (beta1, beta2) = self.state[parameter], group["betas"]
                mean, gradient = state.get("mean", torch.zeros_like(parameter)), parameter.grad
                direction = torch.sign(beta1 * mean + (1 - beta1) * gradient)
                parameter.data -= group["lr"] * (direction + group["weight_decay"] * parameter.data)
                state["mean"] = beta2 * mean + (1 - beta2) * gradient


def tensors_of(tree: nnx.State, rows: dict) -> dict[str, np.ndarray]:
    """Returns every projection of every layer as an array of its own, under a name with its place in the model."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    parts = jax.jit(lambda leaves: [split(path, leaf, rows) for path, leaf in zip(paths, leaves, strict=True)])
    return {
        ".".join((*names_of(path), str(part), str(number))): np.array(array)
        for path, arrays in zip(paths, parts(jax.tree.leaves(tree)), strict=True)
        for part, stack in enumerate(arrays)
        for number, array in enumerate(np.asarray(stack))
    }


def is_hidden_matrix(name: str, tensor: torch.Tensor) -> bool:
    return tensor.ndim == 2 and name.startswith("blocks.")


def groups_of(named: dict[str, torch.Tensor]) -> list[dict]:
    """Returns torch's groups of parameters: norm scales and biases have no weight decay."""
    plain = [tensor for name, tensor in named.items() if {"scale", "bias"} & set(name.split("."))]
    others = [tensor for name, tensor in named.items() if not {"scale", "bias"} & set(name.split("."))]
    return [{"params": others, "weight_decay": DECAY}, {"params": plain, "weight_decay": 0.0}]


def sgd(**options):
    return lambda named: [torch.optim.SGD(groups_of(named), lr=RATE, **options)]


def lion(named):
    return [Lion(groups_of(named), {"lr": RATE, "betas": (0.8, 0.95)})]


def adafactor(named):
    return [transformers.Adafactor(groups_of(named), lr=RATE, scale_parameter=False, relative_step=False)]


def muon(**options):
    def optimizers(named):
        hidden = {name: tensor for name, tensor in named.items() if is_hidden_matrix(name, tensor)}
        others = {name: tensor for name, tensor in named.items() if name not in hidden}
        first = torch.optim.Muon(
            hidden.values(), lr=RATE, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw", **options
        )
        return [first, torch.optim.AdamW(groups_of(others), lr=RATE, betas=(0.8, 0.95))]

    return optimizers


CASES = {
    "sgd": ({"optim": "sgd"}, sgd()),
    "nesterov": ({"optim": "sgd", "optim_args": {"momentum": 0.8, "nesterov": True}}, sgd(momentum=0.8, nesterov=True)),
    "lion": ({"optim": "lion_32bit"}, lion),
    "adafactor": ({"optim": "adafactor"}, adafactor),
    "muon": ({"optim": "muon"}, muon()),
    "muon, plain": ({"optim": "muon", "optim_args": "momentum=0.5,nesterov=false"}, muon(momentum=0.5, nesterov=False)),
}


def run_both(config: TrainConfig, model, make_optimizers):
    """Runs both optimizers on the same gradients, and returns all parameters before and after, ours and torch's."""
    rng, rows = np.random.default_rng(0), rows_of(model)
    _, ours, _ = split_trained(model)
    start = tensors_of(ours, rows)
    named = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in start.items()}
    theirs = make_optimizers(named)
    optimizer = make_optimizer(config, optax.constant_schedule(RATE), model)
    state = jax.jit(optimizer.init)(ours)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(state)) == state_bytes(config, model)

    @jax.jit
    def update(ours, state, gradients):
        updates, state = optimizer.update(gradients, state, ours)
        return optax.apply_updates(ours, updates), state

    for _ in range(STEPS):
        gradients = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), ours)
        ours, state = update(ours, state, gradients)
        for name, gradient in tensors_of(gradients, rows).items():
            named[name].grad = torch.tensor(gradient)
        torch.nn.utils.clip_grad_norm_(named.values(), config.max_grad_norm)
        for each in theirs:
            each.step()
    return start, tensors_of(ours, rows), {name: tensor.detach().numpy() for name, tensor in named.items()}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "adapters") for name in ("sgd", "lion", "muon, plain")),
        *((name, "all") for name in ("nesterov", "adafactor", "muon")),
    ],
)
def test_every_projection_is_updated_as_by_torch(name, kind, monkeypatch):
    # torch's Muon computes in bfloat16.
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    settings, theirs = CASES[name]
    family, lora = MODELS[kind]
    settings = {"weight_decay": DECAY, "adam_beta1": 0.8, "adam_beta2": 0.95, "max_grad_norm": 2.0} | settings
    start, ours, expected = run_both(TrainConfig(**settings), small_model(family, lora=lora), theirs)
    for tensor, value in expected.items():
        moved = np.abs(value - start[tensor]).max()
        assert moved > 0
        # Each step rounds a parameter and its update; Newton's iteration multiplies an error by about 3.4 five times.
        np.testing.assert_allclose(ours[tensor], value, rtol=1e-6, atol=1e-3 * moved, err_msg=tensor)
