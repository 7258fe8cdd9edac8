"""Tests that each schedule has the learning rates of transformers at all steps, and which parameters are refused."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpack import InputError, TrainConfig
from jaxpack.optimizers.schedules import make_schedule

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

PEAK = 3e-4
SCHEDULES = {
    "linear": ("linear", {}),
    "cosine": ("cosine", {}),
    "cosine, waves": ("cosine", {"num_cycles": 1.7}),
    "constant": ("constant", {}),
    "constant_with_warmup": ("constant_with_warmup", {}),
    "min_lr": ("cosine_with_min_lr", {"min_lr": 1e-5}),
    "min_lr_rate": ("cosine_with_min_lr", {"min_lr_rate": 0.25, "num_cycles": 1.2}),
    "one restart": ("cosine_with_restarts", {}),
    "three restarts": ("cosine_with_restarts", {"num_cycles": 3}),
    "restarts that float64 delays": ("cosine_with_restarts", {"num_cycles": 49}),  # 49 * (1 / 49) < 1
    "more restarts than steps": ("cosine_with_restarts", {"num_cycles": 200}),
    "polynomial": ("polynomial", {}),
    "power": ("polynomial", {"lr_end": 1e-5, "power": 2.5}),
    "inverse_sqrt": ("inverse_sqrt", {}),
    "timescale": ("inverse_sqrt", {"timescale": 3}),
    "stable": ("warmup_stable_decay", {"num_decay_steps": 20}),
    "stable, linear": ("warmup_stable_decay", {"num_decay_steps": 7, "decay_type": "linear", "min_lr_ratio": 0.1}),
    "stable, roots": (
        "warmup_stable_decay",
        {"num_decay_steps": 30, "warmup_type": "1-sqrt", "decay_type": "1-sqrt", "min_lr_ratio": 0.2},
    ),
    "stable, waves": (
        "warmup_stable_decay",
        {"num_decay_steps": 30, "num_stable_steps": 5, "warmup_type": "cosine", "num_cycles": 1.3},
    ),
    "no decay": ("warmup_stable_decay", {"num_decay_steps": 0}),
}
LENGTHS = [(98, 0), (98, 13), (98, 0.1), (98, 49), (98, 98), (5, 20), (2, 1), (1, 0), (1, 1)]  # steps, warm-up


def rates_of_transformers(kind: str, arguments: dict, num_steps: int, warmup: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    schedule = transformers.get_scheduler(kind, optimizer, warmup, num_steps, arguments)
    rates = []
    for step in range(num_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step < num_steps - 1:  # After the last step, "polynomial" divides by 0 if all steps are warm-up.
            schedule.step()
    return rates


@pytest.mark.filterwarnings("ignore:.*num_stable_steps:UserWarning")
@pytest.mark.parametrize("name", SCHEDULES)
def test_all_steps_have_the_learning_rate_of_transformers(name):
    kind, arguments = SCHEDULES[name]
    for num_steps, warmup in LENGTHS:
        warmup = 0 if kind == "constant" else warmup
        settings = {"lr_scheduler_type": kind, "lr_scheduler_kwargs": arguments, "warmup_steps": warmup}
        schedule = make_schedule(TrainConfig(learning_rate=PEAK, **settings), num_steps)
        in_steps = math.ceil(warmup * num_steps) if 0 < warmup < 1 else warmup  # as transformers' Trainer counts them
        expected = rates_of_transformers(kind, arguments, num_steps, in_steps)
        found = jax.vmap(schedule)(jnp.arange(98))[:num_steps]  # one shape, so that little is compiled
        assert found.dtype == jnp.float32
        # A few roundings of a share of the peak, and of the phase of a wave, which is at most 2 pi * 1.7: 6e-8 each.
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * PEAK, err_msg=f"{num_steps}, {warmup}")
        assert float(schedule(0)) == pytest.approx(expected[0], abs=1e-6 * PEAK)


@pytest.mark.parametrize(
    ("kind", "given", "told"),
    [
        ("linear", {"num_cycles": 2}, "must be empty with `lr_scheduler_type` 'linear', got 'num_cycles'. It belongs"),
        ("polynomial", {"min_lr": 0}, r"must be among \('lr_end', 'power'\) with .* got 'min_lr'. It belongs to `lr_s"),
        ("cosine", "cycles=2", r"must be among \('num_cycles',\) with `lr_scheduler_type` 'cosine', got 'cycles'\.$"),
        ("cosine_with_restarts", {"num_cycles": 1.5}, "must have a whole number of at least 1 as `num_cycles`, got 1"),
        ("cosine_with_restarts", "num_cycles=two", "must have a whole number of at least 1 as `num_cycles`, got 'two'"),
        ("cosine", {"num_cycles": float("nan")}, "must have a positive number as `num_cycles`, got nan"),
        ("cosine", {"num_cycles": True}, "must have a positive number as `num_cycles`, got True"),
        ("cosine", "num_cycles", "must be a mapping, or text such as"),
        ("cosine", "num_cycles=1,num_cycles=2", "must have each name once"),
        ("cosine", 5, "must be a mapping, or text such as"),
        ("cosine", '{"num_cycles": }', "must be a mapping, or text such as"),
        ("cosine_with_min_lr", {}, "must have either `min_lr` or `min_lr_rate`"),
        ("cosine_with_min_lr", {"min_lr": 0, "min_lr_rate": 0}, "must have either `min_lr` or `min_lr_rate`"),
        ("warmup_stable_decay", {}, "must have `num_decay_steps`, the steps of the decay"),
        ("warmup_stable_decay", "num_decay_steps=3,decay_type=sqrt", r"must have one of \('linear', 'cosine', '1-sqrt"),
        ("polynomial", {"lr_end": 1}, "must have an `lr_end` below `learning_rate`, got 1.0"),
    ],
)
def test_wrong_parameters_are_refused_with_those_that_there_are(kind, given, told):
    with pytest.raises(InputError, match=f"`lr_scheduler_kwargs` {told}"):
        TrainConfig(lr_scheduler_type=kind, lr_scheduler_kwargs=given)


def test_parameters_come_in_every_form():
    expected = (("decay_type", "1-sqrt"), ("min_lr_ratio", 1e-6), ("num_decay_steps", 5))
    forms = [
        dict(expected),
        expected,
        {"min_lr_ratio": np.float64(1e-6), "num_decay_steps": np.int32(5), "decay_type": "1-sqrt"},
        "num_decay_steps=5, min_lr_ratio=1e-6, decay_type=1-sqrt",
        '{"num_decay_steps": 5, "min_lr_ratio": 1e-6, "decay_type": "1-sqrt"}',
    ]
    for form in forms:
        found = TrainConfig(lr_scheduler_type="warmup_stable_decay", lr_scheduler_kwargs=form).lr_scheduler_kwargs
        assert found == expected
        assert [type(value) for _, value in found] == [str, float, int]
    for none in (None, {}, "", ()):
        assert TrainConfig(lr_scheduler_kwargs=none).lr_scheduler_kwargs == ()
