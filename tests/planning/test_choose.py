"""Tests that predictions are within a tenth of measurements, and that `remat="auto"` follows the predictions."""

import dataclasses
import functools
import itertools
import math
import re
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
import pytest
from measured_runs import id_of, may_be_off
from models import random_documents, small_model
from planned_steps import (
    GIB,
    H200,
    KEYS_PER_TOKEN,
    LORA,
    PACKED_RUNS,
    PADDING_FREE_RUNS,
    abstract_model,
    model_of,
)

from jaxpack import LoraConfig, TrainConfig
from jaxpack.constants import Remat
from jaxpack.data.batching import Batches
from jaxpack.errors import InputError
from jaxpack.kernels.logits import CHUNK
from jaxpack.model.presets import SHAPES
from jaxpack.model.remat import unrolls
from jaxpack.planning.cards import CARDS, card_named, card_of, rates_of
from jaxpack.planning.choose import choices, fits, predict, predict_all, usable_bytes
from jaxpack.planning.cost import StepShape
from jaxpack.planning.memory import argument_bytes, peak_bytes
from jaxpack.planning.time import step_seconds
from jaxpack.train.step import make_train_step
from jaxpack.train.trainer import Trainer


def agrees(peak: int, row: dict) -> bool:
    """Returns whether a peak is within a tenth of the measured one.

    A prediction may be higher for a run that found compiled programs: it held no memory to choose kernels.
    """
    return peak == pytest.approx(row["peak_memory_bytes"], rel=0.1) or (
        row.get("found_programs", 0) > 0 and peak > row["peak_memory_bytes"]
    )


@pytest.mark.parametrize("row", PACKED_RUNS, ids=id_of)
def test_predictions_are_within_a_tenth_of_what_was_measured(row):
    [shape] = row["shapes"]
    step = StepShape.of(model_of(row), tuple(shape), keys_per_token=KEYS_PER_TOKEN)
    prediction = predict(step, rates_of(row["device"]))[row["remat"]]
    assert agrees(prediction.peak_bytes, row)
    assert prediction.seconds == pytest.approx(row["step_seconds"], rel=may_be_off(row))
    assert argument_bytes(step) == pytest.approx(row["argument_bytes"], abs=100)  # a few counters are not predicted
    # When this was measured, the residuals of the last layer had no place on the host.
    assert prediction.host_bytes * (step.num_layers - 1) == row["host_temporary_bytes"] * step.num_layers


@pytest.mark.parametrize("row", PADDING_FREE_RUNS, ids=id_of)
def test_predictions_are_within_a_tenth_of_padding_free_steps_of_many_lengths(row):
    lengths = np.array(row["shapes"])[:, 2]
    steps_of = {T: StepShape.of(model_of(row), (1, 1, T), keys_per_token=KEYS_PER_TOKEN) for T in lengths.tolist()}
    predicted = {T: step_seconds(step, row["remat"], H200) for T, step in steps_of.items()}
    steps = lengths[np.searchsorted(lengths, row["tokens"][-row["steps"] :])].tolist()
    assert len(set(steps)) > 1
    assert np.mean([predicted[T] for T in steps]) == pytest.approx(row["step_seconds"], rel=may_be_off(row))
    assert agrees(predict(steps_of[lengths.max()], H200)[row["remat"]].peak_bytes, row)


def test_the_page_on_memory_says_what_is_predicted():
    page = (Path(__file__).parent.parent.parent / "docs/memory.md").read_text()
    rows = re.findall(r'^\| `"(\w+)"` \|.*?\| ([\d.]+ GiB, [\d.]+ s) \|', page, re.MULTILINE)
    assert len(rows) == 6 + 2  # six rows of Qwen3-4B, two of Qwen3-8B

    def predicted(model: str, remat: str) -> str:
        step = StepShape.of(abstract_model(model, LORA), (1, 16, 1024), keys_per_token=KEYS_PER_TOKEN)
        prediction = predict(step, H200)[remat]
        return f"{prediction.peak_bytes / GIB:.1f} GiB, {prediction.seconds:.2f} s"

    models_of_rows = ["Qwen3-4B"] * 6 + ["Qwen3-8B"] * 2
    assert rows == [(remat, predicted(model, remat)) for model, (remat, _) in zip(models_of_rows, rows, strict=True)]


def test_both_ends_and_both_gpus_were_measured():
    assert {card_of(row["device"]) for row in PACKED_RUNS} == {card for card in CARDS if card.measured}
    assert {"offload", "none"} <= {row["remat"] for row in PACKED_RUNS if not row["full_finetuning"]}
    assert any(row["full_finetuning"] for row in PACKED_RUNS)


@pytest.mark.parametrize("lora", [LORA, LoraConfig(r=8, target_modules="q_proj,v_proj"), None], ids=str)
@pytest.mark.parametrize("shape", [(1, 16, 1024), (4, 2, 4096), (1, 1, 16384)], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_to_keep_more_takes_more_memory_and_less_time(name, shape, lora):
    step = StepShape.of(abstract_model(name, lora), shape)
    offload, heads, *others = predict(step, H200).values()
    for less, more in itertools.pairwise(others):
        assert less.seconds > more.seconds
        # A loop over layers allocates all gradients at its start. Without a loop, gradients take the place of residuals
        # that are freed.
        unlooped = lora is None and unrolls(more.choice.remat) and not unrolls(less.choice.remat)
        assert less.peak_bytes <= more.peak_bytes + (4 * step.trained if unlooped else 0)
    # With a link that keeps up, offloading saves recomputed matmuls for LoRA, and none where all weights are trained.
    at_once = predict(step, H200._replace(link=math.inf))
    assert offload.peak_bytes <= heads.peak_bytes
    assert offload.peak_bytes <= others[0].peak_bytes
    if lora is None:
        assert at_once["offload"].seconds == at_once["offload_heads"].seconds == others[0].seconds
    else:
        assert at_once["offload_heads"].seconds < at_once["offload"].seconds < others[0].seconds
        assert offload.host_bytes < heads.host_bytes


# --- Choice of remat ---


class FakeGpu(NamedTuple):
    """Stands in for a GPU: it answers only what is asked about its memory and its kind."""

    limit: int
    in_use: int
    device_kind: str = "NVIDIA H200"
    platform: str = "gpu"

    def memory_stats(self) -> dict[str, int]:
        return {"bytes_limit": self.limit, "bytes_in_use": self.in_use}


ON_DEVICE = {"offload_weights": "off", "offload_embedding": "off"}
PACKED = TrainConfig(packing=True, per_device_train_batch_size=16, max_steps=1, **ON_DEVICE)


@functools.cache
def batches() -> Batches:
    return Batches(random_documents(200 * [120]), PACKED)


@pytest.fixture
def predictions() -> dict:
    return predict(StepShape.of_run(abstract_model("Qwen3-4B", LORA), batches()), H200)


@pytest.fixture
def resolved(monkeypatch):
    """Calls `choices` for Qwen3-4B on a GPU with `free` bytes, beside 8 GiB of its own and 3 GiB of other processes."""

    def resolved(free: float, host: float | None = None, platform: str = "gpu", **changes):
        held, others = 8 * GIB, 3 * GIB
        device = FakeGpu(limit=held + others + int(free), in_use=held + others, platform=platform)
        monkeypatch.setattr("jaxpack.planning.choose.current_device", lambda: device)
        monkeypatch.setattr("jaxpack.planning.choose.available_host_bytes", lambda: host)
        config = TrainConfig(**(vars(PACKED) | changes))
        return choices(config, abstract_model("Qwen3-4B", LORA), batches(), held)[0]

    return resolved


@pytest.mark.parametrize("remat", get_args(Remat))
def test_auto_takes_the_fastest_that_fits(resolved, predictions, remat):
    every = predict_all(StepShape.of_run(abstract_model("Qwen3-4B", LORA), batches()), H200, PACKED)

    def fastest(memory: float) -> tuple[Remat, int]:
        fitting = [p for p in every if p.peak_bytes <= memory]
        return min(fitting, key=lambda p: p.seconds).choice[:2]

    needed, largest = predictions[remat].peak_bytes, (remat, CHUNK)
    assert resolved(1e6, memory_limit=(needed + 1) / GIB)[:2] == fastest(needed)
    assert resolved(1.1 * needed + 100 - 8 * GIB)[:2] == fastest(needed)  # a tenth more than predicted must be free
    assert resolved(1.09 * needed - 8 * GIB)[:2] == fastest(0.991 * needed) != largest
    assert resolved(1e6, memory_limit=(needed - 1) / GIB)[:2] == fastest(needed - 1) != largest


@pytest.mark.parametrize(
    ("name", "memory", "expected"), [("Qwen3-4B", 14, "offload"), ("Qwen3-8B", 22, "offload_heads")]
)
def test_what_is_offloaded_is_what_the_link_carries(name, memory, expected):
    predictions = predict(StepShape.of(abstract_model(name, LORA), (1, 16, 1024), keys_per_token=KEYS_PER_TOKEN), H200)
    assert fits(predictions.values(), memory * GIB, 64 * GIB)[0].choice.remat == expected


@pytest.mark.parametrize(("kind", "platform"), [("NVIDIA X1", "gpu"), ("cpu", "cpu")])
def test_of_another_card_its_own_memory_counts_and_not_that_of_this_device(kind, platform, monkeypatch):
    here = FakeGpu(limit=200 * GIB, in_use=0, device_kind=kind, platform=platform)
    monkeypatch.setattr("jaxpack.planning.choose.current_device", lambda: here)
    monkeypatch.setattr("jaxpack.planning.choose.available_host_bytes", lambda: 0)
    model = abstract_model("Qwen3-4B", LORA)

    def chosen(name: str, **changes) -> Remat:
        return choices(TrainConfig(**vars(PACKED) | changes), model, batches(), 0, card_named(name))[0].remat

    assert chosen("H200") == chosen("H200", remat="none") == "none"
    assert chosen("H100") == "none"
    assert chosen("A100 40GB") == "offload_heads"
    assert chosen("H200", memory_limit=12.0) == "offload"
    assert chosen("RTX 3060") == "offload"
    least = r'remat "offload" with the logits of \d+ tokens at a time'
    with pytest.raises(InputError, match=rf"`gpu` must have 9.\d GiB \({least}\) and 5.6 GiB of host memory for"):
        chosen("RTX 3080 10GB")


@pytest.mark.parametrize(
    ("changes", "card", "advice"),
    [
        ({"per_device_train_batch_size": 60}, "RTX 4080", "`gpu` must have .* got RTX 4080"),
        ({"per_device_train_batch_size": 80, "packing": False}, "RTX 5080", "`gpu` must have .* got RTX 5080"),
        ({"per_device_train_batch_size": 80, "packing": False, "padding_free": False}, "RTX 5080", "`gpu` must have"),
        ({"per_device_train_batch_size": 40, "memory_limit": 11.0}, "RTX 5080", "`memory_limit` must be at least"),
    ],
    ids=str,
)
def test_the_batch_size_that_is_advised_is_the_largest_that_fits(changes, card, advice):
    model, documents = abstract_model("Qwen3-4B", LORA), random_documents(60 * [1000, 900])

    def refusal(size: int) -> str:
        config = TrainConfig(
            **ON_DEVICE | {"packing": True, "max_steps": 1} | changes | {"per_device_train_batch_size": size}
        )
        try:
            choices(config, model, Batches(documents, config), 0, card_named(card))
        except InputError as error:
            return str(error)
        return ""

    said = refusal(changes["per_device_train_batch_size"])
    assert re.match(advice, said)
    size = int(re.search(r"(?<=A batch size of )\d+(?= is predicted to fit\.)", said)[0])
    assert refusal(size) == ""
    assert refusal(size + 1) != ""


@pytest.mark.parametrize(
    ("name", "card", "changes", "advice"),
    [
        ("Qwen3-8B", "RTX 5080", {}, "The weights and the optimizer's state take 15.7 GiB: choose a smaller model or"),
        (
            "Qwen3-4B",
            "RTX 3080 10GB",
            {},
            "Not even a batch size of 1 is predicted to fit: a smaller `max_length` needs",
        ),
        ("Qwen3-4B", "RTX 5080", {"remat": "none"}, 'Another choice fits: take `remat` "auto" instead of "none".'),
    ],
)
def test_a_refusal_says_what_to_change(name, card, changes, advice):
    with pytest.raises(InputError, match=f"got {card}, on which a run may use .* GiB. {advice}"):
        choices(TrainConfig(**vars(PACKED) | changes), abstract_model(name, LORA), batches(), 0, card_named(card))


def test_with_more_memory_and_the_same_rates_a_card_refuses_nothing_that_a_smaller_one_takes():
    smaller = card_named("RTX 3060")
    for name, rows in itertools.product(("Qwen3-0.6B", "Qwen3-4B", "Qwen3-8B"), (1, 8, 64)):
        predictions = predict(StepShape.of(abstract_model(name, LORA), (1, rows, 1024)), smaller.rates).values()
        fastest = []
        for gigabytes in range(2, 200):
            card = dataclasses.replace(smaller, gigabytes=gigabytes)
            memory = usable_bytes(TrainConfig(), card=card)
            assert memory < gigabytes * GIB
            fastest.append(min((p.seconds for p in fits(predictions, memory, 64 * GIB)), default=math.inf))
        assert fastest == sorted(fastest, reverse=True)
        assert fastest[0] == math.inf > fastest[-1]


def test_what_is_asked_for_by_name_is_taken(resolved):
    taken = resolved(0, remat="none")
    assert (taken.remat, taken.reason) == ("none", None)


def test_auto_leaves_a_host_alone_that_has_no_room(resolved, predictions):
    limit = (predictions["offload"].peak_bytes + GIB) / GIB
    needed = predictions["offload"].host_bytes
    assert resolved(0, host=needed, memory_limit=limit)[0] == "offload"
    with pytest.raises(InputError, match=r'`memory_limit` must be at least 12.6 GiB \(remat "full"\)'):
        resolved(0, host=needed - 1, memory_limit=limit)


def test_too_little_host_memory_for_what_is_asked_for_is_refused(resolved, predictions):
    needed = predictions["offload"].host_bytes
    assert needed == 36 * 16 * 1024 * 2 * 2560 * 2  # 5.6 GiB
    assert resolved(0, host=needed, remat="offload")[0] == "offload"
    message = r'`remat` "offload" must fit in host memory: .* of all layers need 5.6 GiB, got 5.5 GiB available'
    with pytest.raises(InputError, match=message):
        resolved(0, host=5.5 * GIB, remat="offload")
    assert resolved(0, host=0, remat="full")[0] == "full"


def test_no_more_is_offloaded_than_xla_pins(resolved, predictions, monkeypatch):
    limit = (predictions["offload"].peak_bytes + GIB) / GIB
    assert resolved(0, host=500 * GIB, memory_limit=limit)[0] == "offload"
    monkeypatch.setenv("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", "5")
    with pytest.raises(InputError, match=r"need 5.6 GiB, got XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB of 5.0 GiB"):
        resolved(0, host=500 * GIB, remat="offload")
    with pytest.raises(InputError, match=r'`memory_limit` must be at least 12.6 GiB \(remat "full"\)'):
        resolved(0, host=500 * GIB, memory_limit=limit)


def test_nothing_is_offloaded_from_a_host_to_itself(resolved):
    assert resolved(0, memory_limit=12)[0] == "offload"
    with pytest.raises(InputError, match=r'at least 12.6 GiB \(remat "full"\)'):
        resolved(0, memory_limit=12, platform="cpu")


def test_the_choice_is_explained(resolved):
    assert resolved(0, memory_limit=50).reason == (
        'remat "keep_projections": a step is predicted to take 0.504 s and 47.4 GiB of the 50.0 GiB that the run may '
        'use; remat "none" would take 0.493 s, but need 58.8 GiB'
    )
    following = resolved(0, memory_limit=14).reason.partition("; ")[2]
    assert following == 'remat "keep_projections" would take 0.504 s, but need 47.4 GiB'
    alone = 'remat "none": a step is predicted to take 0.493 s and 58.8 GiB of the 100.0 GiB that the run may use'
    assert resolved(0, memory_limit=100).reason == alone


def test_a_step_that_fits_nowhere_is_refused(resolved):
    step = "a step of 1 x 16 x 1024 tokens"
    need = r'9.5 GiB \(remat "offload" with the logits of 512 tokens at a time\)'
    with pytest.raises(InputError, match=f"`memory_limit` must be at least {need} for {step}, got 9.0 GiB"):
        resolved(0, memory_limit=9)
    message = "`per_device_train_batch_size` or `max_length` must be smaller, got a batch size of 16 and a maximum"
    message += f" length of 1024: {step} needs {need}, but only 8.2 GiB can be used"
    with pytest.raises(InputError, match=message):
        resolved(GIB)


@pytest.mark.parametrize(("limit", "expected"), [(None, "full"), (10, "none")])
def test_a_run_prints_and_takes_the_choice(limit, expected, monkeypatch, capsys):
    given = []

    def recording(*args, remat: Remat, loss_chunk: int, **options):
        given.append((remat, loss_chunk))
        return make_train_step(*args, remat=remat, loss_chunk=loss_chunk, **options)

    monkeypatch.setattr("jaxpack.train.run.make_train_step", recording)
    rows = [{"input_ids": list(range(20))} for _ in range(4)]
    config = TrainConfig(max_length=64, packing=True, per_device_train_batch_size=2, max_steps=1, memory_limit=limit)
    Trainer(small_model("qwen3", lora=LORA), None, rows, config).train()
    assert given == [(expected, CHUNK)]
    assert capsys.readouterr().err.count(f'remat "{expected}": ') == 1


def test_a_smaller_chunk_of_the_loss_takes_less_memory_and_more_time(resolved):
    step = StepShape.of_run(abstract_model("Qwen3-4B", LORA), batches())
    found = [p for p in predict_all(step, H200, PACKED) if p.choice.remat == "offload"]
    assert [p.choice.loss_chunk for p in found] == [1024, 512, 256, 128]
    assert [p.seconds for p in found] == sorted(p.seconds for p in found)
    assert [p.peak_bytes for p in found] == sorted((p.peak_bytes for p in found), reverse=True)
    # The search for kernels holds the float32 logits of a chunk twice: this is all that 512 tokens fewer can save.
    assert found[0].peak_bytes - found[1].peak_bytes <= 512 * (151_936 * 2 * 4 + 2560 * 2)
    assert found[0].peak_bytes > found[1].peak_bytes
    assert resolved(0, memory_limit=(found[1].peak_bytes + 1) / GIB)[:2] == ("offload", 512)


def test_the_next_choice_needs_clearly_less_memory(monkeypatch):
    monkeypatch.setattr("jaxpack.planning.choose.current_device", lambda: FakeGpu(limit=100 * GIB, in_use=0))
    every = {
        p.choice[:2]: p
        for p in predict_all(StepShape.of_run(abstract_model("Qwen3-4B", LORA), batches()), H200, PACKED)
    }
    for config in (PACKED, dataclasses.replace(PACKED, remat="keep_attention")):
        taken = [every[choice[:2]] for choice in choices(config, abstract_model("Qwen3-4B", LORA), batches(), 0)]
        assert len(taken) > 1 or config.remat == "keep_attention"
        for one, after in itertools.pairwise(taken):
            assert after.peak_bytes < 0.98 * one.peak_bytes
            assert after.seconds >= one.seconds
        assert config.remat in ("auto", *{p.choice.remat for p in taken})


# --- Frozen weights in the host's memory ---


@functools.cache
def streamed(rows: int = 16, **changes) -> StepShape:
    step = StepShape.of(abstract_model("Qwen3-4B", LORA), (1, rows, 1024), keys_per_token=KEYS_PER_TOKEN)
    return dataclasses.replace(step, **changes)


def test_weights_in_host_memory_leave_the_device_but_for_two_layers():
    resident, moved = streamed(), streamed(offload_weights=True)
    layers = 36 * 100_925_440 * 2  # the projections' elements in each layer, in bfloat16
    assert resident.layer_weight_bytes == layers
    before, after = predict(resident, H200), predict(moved, H200)
    assert set(after) == {"offload", "offload_heads"}
    for remat, prediction in after.items():
        assert peak_bytes(resident, remat) - peak_bytes(moved, remat) == layers - 2 * layers // 36
        assert prediction.host_bytes - before[remat].host_bytes == layers
        assert prediction.seconds >= before[remat].seconds
        assert prediction.choice.offloads == (True, False)


def test_an_embedding_in_host_memory_takes_the_head_along():
    resident, moved = streamed(), streamed(offload_embedding=True)
    matrix = 151_936 * 2560 * 2
    assert resident.embedding_bytes == matrix
    before, after = predict(resident, H200)["full"], predict(moved, H200)["full"]
    rows = 2 * 16 * 1024 * 2560 * 2  # of the embedding, for two batches
    assert argument_bytes(resident) - argument_bytes(moved) == matrix - rows
    assert after.host_bytes - before.host_bytes == matrix
    untied = StepShape.of(abstract_model("Qwen3-8B", LORA), (1, 16, 1024))
    assert untied.embedding_bytes == 2 * 151_936 * 4096 * 2


def test_the_link_decides_what_fetching_costs():
    """Tests that copies beside computation cost nothing, until they take longer than it."""
    many, few = streamed(offload_weights=True), streamed(rows=1, offload_weights=True)
    slow = H200._replace(link=1e9)
    for step, rates, hidden in ((many, H200, True), (few, H200, False), (many, slow, False)):
        resident = dataclasses.replace(step, offload_weights=False)
        times = [predict(one, rates)["offload"].seconds for one in (resident, step)]
        assert (times[0] == times[1]) == hidden
    copied_twice = 2 * few.layer_weight_bytes / slow.link
    assert predict(few, slow)["offload"].seconds == pytest.approx(copied_twice, rel=0.1)


def test_weights_move_only_if_nothing_faster_fits(monkeypatch):
    monkeypatch.setattr("jaxpack.planning.choose.available_host_bytes", lambda: 64 * GIB)
    model = abstract_model("Qwen3-4B", LORA)
    auto = dataclasses.replace(PACKED, offload_weights="auto", offload_embedding="auto")

    def chosen(limit: float, **changes):
        config = dataclasses.replace(auto, memory_limit=limit, **changes)
        monkeypatch.setattr("jaxpack.planning.choose.current_device", lambda: FakeGpu(limit=100 * GIB, in_use=0))
        return choices(config, model, batches(), 0)

    assert chosen(60)[0].offloads == chosen(12)[0].offloads == (False, False)
    assert chosen(4)[0].offloads == (True, False)
    assert chosen(2.6)[0].offloads == (True, True)
    assert chosen(60, offload_weights="on")[0].offloads == (True, False)
    assert chosen(60, offload_embedding="on")[0].offloads == (False, True)
    with pytest.raises(InputError, match='With `offload_weights` "auto", it is predicted to fit as it is'):
        chosen(4, offload_weights="off")
    for one, after in itertools.pairwise(chosen(12)):  # What has moved stays there.
        assert all(now or not before for before, now in zip(one.offloads, after.offloads, strict=True))
    assert chosen(12)[-1].offloads == (True, True)
