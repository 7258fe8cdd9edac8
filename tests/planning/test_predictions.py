"""Predictions agree with what was measured and with the model's own arrays, and `remat="auto"` follows them."""

import functools
import itertools
import math
import re
from pathlib import Path
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from measured_runs import id_of, may_be_off, measured_runs
from models import random_documents, small_config, small_model

from jaxpack import LoraConfig, TrainConfig, Transformer
from jaxpack.bench import models
from jaxpack.constants import Remat
from jaxpack.data.batching import Batches
from jaxpack.data.packing import PackedBatch
from jaxpack.errors import InputError
from jaxpack.model.lora import add_lora
from jaxpack.model.presets import SHAPES
from jaxpack.model.remat import unrolls
from jaxpack.planning.predictions import (
    RATES,
    Job,
    argument_bytes,
    fits,
    host_bytes,
    known_gpu,
    peak_bytes,
    predict,
    rates_of,
    resolve,
    run_seconds,
    step_seconds,
)
from jaxpack.train.optimizer import make_optimizer, make_schedule
from jaxpack.train.step import TrainState, make_train_step, split_trainable
from jaxpack.train.trainer import Trainer

H200 = RATES["H200"]
GIB = 2**30


@functools.cache
def abstract_model(name: str, lora: LoraConfig | None) -> Transformer:
    return models.abstract_model(SHAPES[name], lora)


def abstract_small(family: str, **changes) -> Transformer:
    return nnx.eval_shape(lambda: Transformer(small_config(family, **changes), rngs=nnx.Rngs(0)))


LORA = LoraConfig(r=16)


PACKED_RUNS = [row for gpu in RATES for row in measured_runs(gpu, layout="packed")]
PADDING_FREE_RUNS = measured_runs(layout="padding-free")
# Alpaca's documents, weighted by their tokens: 80 keys a token.
KEYS_PER_TOKEN = 80


def model_of(row: dict) -> Transformer:
    return abstract_model(row["model"], None if row["full_finetuning"] else LORA)


def agrees(peak: int, row: dict) -> bool:
    """Within a tenth; where the programs were found, nothing was held to choose kernels for them."""
    return peak == pytest.approx(row["peak_memory_bytes"], rel=0.1) or (
        row.get("found_programs", 0) > 0 and peak > row["peak_memory_bytes"]
    )


@pytest.mark.parametrize("row", PACKED_RUNS, ids=id_of)
def test_predictions_are_within_a_tenth_of_what_was_measured(row):
    [shape] = row["shapes"]
    job = Job.of(model_of(row), tuple(shape), keys_per_token=KEYS_PER_TOKEN)
    prediction = predict(job, rates_of(row["device"]))[row["remat"]]
    assert agrees(prediction.peak_bytes, row)
    assert prediction.seconds == pytest.approx(row["step_seconds"], rel=may_be_off(row))
    assert argument_bytes(job) == pytest.approx(row["argument_bytes"], abs=100)  # counters
    assert prediction.host_bytes == row["host_temporary_bytes"]


@pytest.mark.parametrize("row", PADDING_FREE_RUNS, ids=id_of)
def test_predictions_are_within_a_tenth_of_padding_free_steps_of_many_lengths(row):
    lengths = np.array(row["shapes"])[:, 2]
    jobs = {T: Job.of(model_of(row), (1, 1, T), keys_per_token=KEYS_PER_TOKEN) for T in lengths.tolist()}
    predicted = {T: step_seconds(job, row["remat"], H200) for T, job in jobs.items()}
    steps = lengths[np.searchsorted(lengths, row["tokens"][-row["steps"] :])].tolist()
    assert len(set(steps)) > 1
    assert np.mean([predicted[T] for T in steps]) == pytest.approx(row["step_seconds"], rel=may_be_off(row))
    assert agrees(predict(jobs[lengths.max()], H200)[row["remat"]].peak_bytes, row)


def test_the_page_on_memory_says_what_is_predicted():
    page = (Path(__file__).parent.parent.parent / "docs/memory.md").read_text()
    rows = re.findall(r'^\| `"(\w+)"` \|.*?\| ([\d.]+ GiB, [\d.]+ s) \|', page, re.MULTILINE)
    assert len(rows) == 6 + 2  # and those of what is offloaded

    def predicted(model: str, remat: str) -> str:
        job = Job.of(abstract_model(model, LORA), (1, 16, 1024), keys_per_token=KEYS_PER_TOKEN)
        prediction = predict(job, H200)[remat]
        return f"{prediction.peak_bytes / GIB:.1f} GiB, {prediction.seconds:.2f} s"

    models_of_rows = ["Qwen3-4B"] * 6 + ["Qwen3-8B"] * 2
    assert rows == [(remat, predicted(model, remat)) for model, (remat, _) in zip(models_of_rows, rows, strict=True)]


@pytest.mark.parametrize(
    "row", [row for row in PADDING_FREE_RUNS if (row["model"], row["remat"]) == ("Qwen3-4B", "offload")], ids=id_of
)
def test_short_steps_take_what_choosing_their_kernels_takes(row):
    job = Job.of(model_of(row), max(map(tuple, row["shapes"])))
    remat, peak = row["remat"], row["peak_memory_bytes"]
    assert peak_bytes(job, remat) < 0.9 * peak
    assert predict(job, H200)[remat].peak_bytes == pytest.approx(peak, rel=0.02)


def test_both_ends_and_both_gpus_were_measured():
    assert {known_gpu(row["device"]) for row in PACKED_RUNS} == set(RATES)
    assert {"offload", "none"} <= {row["remat"] for row in PACKED_RUNS if not row["full_finetuning"]}
    assert any(row["full_finetuning"] for row in PACKED_RUNS)


@pytest.mark.parametrize("lora", [LoraConfig(r=8), None], ids=["lora", "full"])
def test_arguments_are_those_of_the_step(family, lora):
    model = small_model(family, lora=lora, dtype=jnp.bfloat16)
    _, trainable, frozen = split_trainable(model)
    config = TrainConfig()
    moments = [x for x in jax.tree.leaves(make_optimizer(config, make_schedule(config, 1)).init(trainable)) if x.ndim]
    arrays = [*jax.tree.leaves((trainable, frozen)), *moments]
    batch = 4 * 3 * 2 * 128 * 4
    assert argument_bytes(Job.of(model, (3, 2, 128))) == sum(x.nbytes for x in arrays) + batch


def compiled_temporary_bytes(model: Transformer, shape: tuple[int, int, int]) -> int:
    """What XLA takes here, beside its arguments, for a step that recomputes everything."""
    graph, trainable, frozen = split_trainable(model)
    optimizer = make_optimizer(TrainConfig(), optax.constant_schedule(1e-3))
    step = make_train_step(graph, optimizer, remat="full", implementation="xla")
    state = TrainState(trainable, optimizer.init(trainable), jnp.int32(0))
    batch = PackedBatch(*4 * [jax.ShapeDtypeStruct(shape, jnp.int32)])
    return step.lower(state, frozen, batch).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("accumulation", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_gradients_of_all_weights_take_the_memory_of_a_step_with_few_tokens(accumulation):
    # Where nothing else counts, a CPU's buffers are a GPU's, but for a copy of what the loop over layers has made.
    config = small_config("llama", hidden_size=512, intermediate_size=1536, num_heads=8, head_dim=64, vocab_size=4096)
    model = Transformer(config, rngs=nnx.Rngs(0))
    shape = (accumulation, 1, 128)
    job = Job.of(model, shape)
    predicted = peak_bytes(job, "full") - argument_bytes(job)
    copied = 4 * job.trained if accumulation == 1 else 0
    assert predicted + copied == pytest.approx(compiled_temporary_bytes(model, shape), rel=0.1)


@pytest.mark.parametrize("tied", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_head_that_is_trained_whole_beside_adapters_takes_its_memory(tied):
    sizes = {"hidden_size": 512, "intermediate_size": 512, "num_heads": 8, "head_dim": 64, "vocab_size": 16384}
    whole = ("lm_head", "embed_tokens") if tied else "lm_head"
    lora = LoraConfig(r=4, target_modules="q_proj", modules_to_save=whole)
    model = add_lora(Transformer(small_config("llama", tie_word_embeddings=tied, **sizes), rngs=nnx.Rngs(0)), lora)
    temporary = compiled_temporary_bytes(model, (1, 1, 128))
    job = Job.of(model, (1, 1, 128))
    # A CPU makes float32 of an untied head once more; without its gradient and cast, a half would be missing.
    assert peak_bytes(job, "full") - argument_bytes(job) == pytest.approx(temporary, rel=0.25)


def test_frozen_weights_in_float32_are_cast_as_trained_ones_are():
    model = small_model("llama", dtype=jnp.bfloat16)
    assert not Job.of(add_lora(nnx.clone(model), LORA), (1, 1, 128)).layer.casts
    _, trainable, _ = split_trainable(model)
    nnx.update(model, trainable)  # as a run of all weights leaves it
    for tuned in (model, add_lora(nnx.clone(model), LORA)):
        job = Job.of(tuned, (1, 1, 128))
        assert job.layer.casts and host_bytes(job, "offload") == (job.num_layers - 1) * 128 * 48 * 2  # inputs alone


# GiB beside its arguments that a step of all of Qwen3-0.6B's weights has on an H200 (2026-11-27, jax 0.11.2:
# `temp_size_in_bytes` of the step that is compiled there): of so many micro-batches, of one and of five rows of 1,024.
TEMPORARY = {
    ("full", 1): (2.545, 3.031),
    ("full", 2): (4.423, 5.907),
    ("keep_projections", 1): (3.019, 6.014),
    ("keep_projections", 2): (4.303, 8.284),
    ("none", 1): (3.034, 7.797),
    ("none", 2): (5.246, 10.018),
}


@pytest.mark.parametrize(("choice", "measured"), TEMPORARY.items(), ids=str)
def test_gradients_of_all_weights_take_the_memory_that_a_gpu_needs_for_them(choice, measured):
    remat, accumulation = choice
    for rows, temporary in zip((1, 5), measured, strict=True):
        job = Job.of(abstract_model("Qwen3-0.6B", None), (accumulation, rows, 1024))
        assert peak_bytes(job, remat) == pytest.approx(argument_bytes(job) + temporary * GIB, rel=0.1)


@pytest.mark.parametrize("lora", [LORA, LoraConfig(r=8, target_modules="q_proj,v_proj"), None], ids=str)
@pytest.mark.parametrize("shape", [(1, 16, 1024), (4, 2, 4096), (1, 1, 16384)], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_to_keep_more_takes_more_memory_and_less_time(name, shape, lora):
    job = Job.of(abstract_model(name, lora), shape)
    offload, heads, *others = predict(job, H200).values()
    for less, more in itertools.pairwise(others):
        assert less.seconds > more.seconds
        # A loop has a place for all gradients from its start: without one, they come as what was kept goes.
        unlooped = lora is None and unrolls(more.remat) and not unrolls(less.remat)
        assert less.peak_bytes <= more.peak_bytes + (4 * job.trained if unlooped else 0)
    # Offloading spares matmuls, with a link that keeps up; where weights are trained it spares none.
    at_once = predict(job, H200._replace(link=math.inf))
    assert offload.peak_bytes <= heads.peak_bytes and offload.peak_bytes <= others[0].peak_bytes
    if lora is None:
        assert at_once["offload"].seconds == at_once["offload_heads"].seconds == others[0].seconds
    else:
        assert at_once["offload_heads"].seconds < at_once["offload"].seconds < others[0].seconds
        assert offload.host_bytes < heads.host_bytes


def test_a_window_bounds_the_keys_of_its_layers():
    model, windowed = (abstract_small("qwen2", sliding_window=window) for window in (None, 7))
    without, within = (Job.of(model, (1, 1, 128)).keys_per_token for model in (model, windowed))
    assert without == 129 / 2
    # One layer of three: 1 + ... + 7 keys of the first seven tokens, 7 of each after.
    assert within == pytest.approx((2 * without + (28 + 121 * 7) / 128) / 3)


def test_a_slow_link_is_waited_for():
    job = Job.of(abstract_model("Qwen3-4B", LORA), (1, 16, 1024))
    seconds = [predict(job, H200._replace(link=link))["offload"].seconds for link in (100e9, 50e9, 5e9)]
    copy = 35 * 16 * 1024 * 2 * 2560 * 2 / 5e9  # in each direction: longer than a pass
    assert seconds[0] == seconds[1]  # beside computation
    assert 2 * copy < seconds[2] < 2 * copy + seconds[0]


def test_steps_of_few_tokens_that_offload_take_as_long_as_starting_their_kernels():
    def seconds(remat, *shape):
        return step_seconds(Job.of(abstract_model("Qwen3-0.6B", LORA), shape), remat, H200)

    for remat in ("offload", "offload_heads"):  # are started one by one
        assert seconds(remat, 1, 1, 128) == seconds(remat, 1, 1, 256) < seconds(remat, 1, 8, 1024)
        assert seconds(remat, 2, 1, 128) == 2 * seconds(remat, 1, 1, 128)
    for remat in ("full", "none"):  # many at a time, in graphs
        assert seconds(remat, 1, 1, 128) < seconds(remat, 1, 1, 256) < seconds("offload", 1, 1, 256)


def test_rates_go_by_the_device():
    assert rates_of("NVIDIA H200") == H200 != rates_of("NVIDIA H100 80GB HBM3") == RATES["H100"]
    for other in ("cpu", "NVIDIA GH200 480GB", "NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA H200 MIG 1g.18gb"):
        assert known_gpu(other) is None and rates_of(other) == rates_of("NVIDIA X1")
    assert all(a <= b for a, b in zip(rates_of("NVIDIA X1"), RATES["H100"], strict=True))


# The choice.


class FakeGpu(NamedTuple):
    """As much of a device as is asked for its memory."""

    limit: int
    in_use: int
    device_kind: str = "NVIDIA H200"
    platform: str = "gpu"

    def memory_stats(self) -> dict[str, int]:
        return {"bytes_limit": self.limit, "bytes_in_use": self.in_use}


PACKED = TrainConfig(packing=True, per_device_train_batch_size=16, max_steps=1)


@functools.cache
def batches() -> Batches:
    return Batches(random_documents(200 * [120]), PACKED)


@pytest.fixture
def predictions() -> dict:
    return predict(Job.of_run(abstract_model("Qwen3-4B", LORA), batches()), H200)


@pytest.fixture
def resolved(monkeypatch):
    """`resolve` of Qwen3-4B on a GPU with so many bytes free, beside the 8 GiB that it holds and 3 of someone else."""

    def resolved(free: float, host: float | None = None, platform: str = "gpu", **changes):
        held, others = 8 * GIB, 3 * GIB
        device = FakeGpu(limit=held + others + int(free), in_use=held + others, platform=platform)
        monkeypatch.setattr("jaxpack.planning.predictions.current_device", lambda: device)
        monkeypatch.setattr("jaxpack.planning.predictions.available_host_bytes", lambda: host)
        config = TrainConfig(**(vars(PACKED) | changes))
        return resolve(config, abstract_model("Qwen3-4B", LORA), batches(), held)

    return resolved


@pytest.mark.parametrize("remat", get_args(Remat))
def test_auto_takes_the_fastest_that_fits(resolved, predictions, remat):
    def fastest(memory: float) -> Remat:
        fitting = [p for p in predictions.values() if p.peak_bytes <= memory]
        return min(fitting, key=lambda p: p.seconds).remat

    needed = predictions[remat].peak_bytes
    assert resolved(1e6, memory_limit=(needed + 1) / GIB)[0] == fastest(needed)
    assert resolved(1.1 * needed + 100 - 8 * GIB)[0] == fastest(needed)  # a tenth more than predicted
    if remat != "offload":
        assert resolved(1.09 * needed - 8 * GIB)[0] == fastest(0.991 * needed) != remat
        assert resolved(1e6, memory_limit=(needed - 1) / GIB)[0] == fastest(needed - 1) != remat


@pytest.mark.parametrize(
    ("name", "memory", "expected"), [("Qwen3-4B", 14, "offload"), ("Qwen3-8B", 22, "offload_heads")]
)
def test_what_is_offloaded_is_what_the_link_carries(name, memory, expected):
    predictions = predict(Job.of(abstract_model(name, LORA), (1, 16, 1024), keys_per_token=KEYS_PER_TOKEN), H200)
    assert fits(predictions.values(), memory * GIB)[0].remat == expected


@pytest.mark.parametrize(("kind", "platform"), [("NVIDIA X1", "gpu"), ("cpu", "cpu")])
def test_of_another_gpu_only_what_is_said_is_known(kind, platform, monkeypatch):
    here = FakeGpu(limit=200 * GIB, in_use=0, device_kind=kind, platform=platform)
    monkeypatch.setattr("jaxpack.planning.predictions.current_device", lambda: here)
    model = abstract_model("Qwen3-4B", LORA)
    assert resolve(PACKED, model, batches(), 0, gpu="H200")[0] == "full"
    limited = TrainConfig(**vars(PACKED) | {"memory_limit": 12.0})
    assert resolve(limited, model, batches(), 0, gpu="H200")[0] == "offload"


def test_a_run_takes_the_time_of_its_steps():
    model = abstract_model("Qwen3-4B", LORA)
    uneven = Batches(
        random_documents([20, 500, 90, 260, 700, 40, 333]), TrainConfig(per_device_train_batch_size=3, max_steps=9)
    )
    each = [step_seconds(Job.of_run(model, uneven, int(T)), "full", H200) for T in uneven.row_lengths]
    assert len(set(each)) > 1
    assert run_seconds(model, uneven, "full", H200) == pytest.approx(sum(each))


def test_what_is_asked_for_by_name_is_taken(resolved):
    assert resolved(0, remat="none") == ("none", None)


def test_auto_leaves_a_host_alone_that_has_no_room(resolved, predictions):
    limit = (predictions["offload"].peak_bytes + GIB) / GIB
    needed = predictions["offload"].host_bytes
    assert resolved(0, host=needed, memory_limit=limit)[0] == "offload"
    with pytest.raises(InputError, match=r'`memory_limit` must be at least 12.6 GiB \(remat "full"\)'):
        resolved(0, host=needed - 1, memory_limit=limit)


def test_too_little_host_memory_for_what_is_asked_for_is_refused(resolved, predictions):
    needed = predictions["offload"].host_bytes
    assert needed == 35 * 16 * 1024 * 2 * 2560 * 2  # 5.5 GiB
    assert resolved(0, host=needed, remat="offload")[0] == "offload"
    message = r'`remat` "offload" needs 5.5 GiB .* what the first 35 layers .*, got 5.4 GiB available'
    with pytest.raises(InputError, match=message):
        resolved(0, host=5.4 * GIB, remat="offload")
    assert resolved(0, host=0, remat="full")[0] == "full"


def test_no_more_is_offloaded_than_xla_pins(resolved, predictions, monkeypatch):
    limit = (predictions["offload"].peak_bytes + GIB) / GIB
    assert resolved(0, host=500 * GIB, memory_limit=limit)[0] == "offload"
    monkeypatch.setenv("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", "5")
    with pytest.raises(InputError, match=r"needs 5.5 GiB .*, got XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB of 5.0 GiB"):
        resolved(0, host=500 * GIB, remat="offload")
    with pytest.raises(InputError, match=r'`memory_limit` must be at least 12.6 GiB \(remat "full"\)'):
        resolved(0, host=500 * GIB, memory_limit=limit)


def test_nothing_is_offloaded_from_a_host_to_itself(resolved):
    assert resolved(0, memory_limit=12)[0] == "offload"
    with pytest.raises(InputError, match=r'at least 12.6 GiB \(remat "full"\)'):
        resolved(0, memory_limit=12, platform="cpu")


def test_the_choice_is_explained(resolved):
    assert resolved(0, memory_limit=50)[1] == (
        'remat "keep_projections": predicted 47.4 GiB of 50.0 GiB and 0.504 s a step; '
        '"none" would take 58.8 GiB and 0.492 s'
    )
    following = resolved(0, memory_limit=14)[1].partition("; ")[2]
    assert following == '"keep_projections" would take 47.4 GiB and 0.504 s'
    assert resolved(0, memory_limit=100)[1] == 'remat "none": predicted 58.8 GiB of 100.0 GiB and 0.492 s a step'


def test_a_step_that_fits_nowhere_is_refused(resolved):
    step, need = "a step of 1 x 16 x 1024 tokens", r'9.8 GiB \(remat "offload"\)'
    with pytest.raises(InputError, match=f"`memory_limit` must be at least {need} for {step}, got 9.0 GiB"):
        resolved(0, memory_limit=9)
    message = f"`per_device_train_batch_size` or `max_length` must be smaller: {step} needs {need}, got 8.2 GiB"
    with pytest.raises(InputError, match=message):
        resolved(GIB)


@pytest.mark.parametrize(("limit", "expected"), [(None, "full"), (10, "none")])
def test_a_run_prints_and_takes_the_choice(limit, expected, monkeypatch, capsys):
    given = []

    def recording(*args, remat: Remat, **options):
        given.append(remat)
        return make_train_step(*args, remat=remat, **options)

    monkeypatch.setattr("jaxpack.train.run.make_train_step", recording)
    rows = [{"input_ids": list(range(20))} for _ in range(4)]
    config = TrainConfig(max_length=64, packing=True, per_device_train_batch_size=2, max_steps=1, memory_limit=limit)
    Trainer(small_model("qwen3", lora=LORA), None, rows, config).train()
    assert given == [expected]
    assert capsys.readouterr().err.count(f'remat "{expected}": ') == 1
