"""Tests that a run reports what `inspect` predicted from a dataset's lengths, and that the advice follows from it."""

import functools
import itertools
import json
import re
from pathlib import Path
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from measured_runs import id_of, may_be_off, measured_runs
from models import random_documents, small_config
from rich.console import Console
from shared_data import beside

import jaxpack
from jaxpack import InputError, Inspection, LoraConfig, TrainConfig, Trainer, Transformer
from jaxpack.bench.cases import case_of
from jaxpack.bench.measure import train_config
from jaxpack.bench.models import abstract_model
from jaxpack.cli.demo import sample, train_tokenizer
from jaxpack.constants import Layout
from jaxpack.data.batching import Batches
from jaxpack.data.documents import Documents
from jaxpack.data.reading import load_documents
from jaxpack.data.synthetic import drawn_documents
from jaxpack.data.tokenizer import Tokenizer
from jaxpack.model.presets import SHAPES
from jaxpack.model.weights import split_trained
from jaxpack.planning.cards import card_named
from jaxpack.planning.cost import StepShape
from jaxpack.planning.inspect import BATCH_SIZES, ORDINARY, histogram, ordinary_padding
from jaxpack.planning.time import step_seconds

ROOT = Path(__file__).parent.parent.parent
LAYOUTS = get_args(Layout)


@functools.cache
def bundled() -> tuple[Tokenizer, Documents]:
    """Returns the demo's questions and a tokenizer for them."""
    tokenizer = train_tokenizer(sample())
    return tokenizer, load_documents(sample(), tokenizer, vocab_size=2048)


def model_for(tokenizer: Tokenizer) -> Transformer:
    config = small_config("qwen3", vocab_size=len(tokenizer))
    return Transformer(config, dtype=jnp.float32, rngs=nnx.Rngs(0))


def skewed(count: int = 300, seed: int = 1) -> Documents:
    """Returns many short documents and a few long ones."""
    lengths = np.random.default_rng(seed).gamma(1.5, 60, count).astype(int) + 4
    return random_documents(lengths.tolist())


@functools.cache
def with_adapters(model: str) -> Transformer:
    return abstract_model(SHAPES[model], LoraConfig(r=16))


def qwen() -> Transformer:
    return with_adapters("Qwen3-4B")


def printed(found: object, width: int = 120, **options) -> str:
    console = Console(width=width, **options)
    with console.capture() as capture:
        console.print(found)
    return capture.get()


# --- Padding ----------------------------------------------------------------------------------------------------------


def test_without_a_max_length_nothing_is_cut_and_the_advice_names_one():
    documents = skewed()
    found, same = (
        jaxpack.inspect(documents, TrainConfig(max_length=limit, per_device_train_batch_size=16))
        for limit in (None, int(documents.lengths.max()))
    )
    assert found.truncation.tokens == 0
    assert found.layouts == same.layouts
    length = f" --max-length {documents.lengths.max()}`"
    assert found.recommendation.replace(length, "`") == same.recommendation
    assert length not in same.recommendation
    assert ("--packing" in found.recommendation) == (length in found.recommendation)
    assert "no document" in printed(found)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 6, 9])
def test_ordinary_padding_is_that_of_all_orders(batch_size):
    lengths = np.array([3, 3, 5, 8, 13, 20])
    orders = np.array(list(itertools.permutations(lengths)))
    positions = 0
    for begin in range(0, 6, batch_size):
        batch = orders[:, begin : begin + batch_size]
        positions += batch.max(axis=1) * batch.shape[1]
    assert ordinary_padding(lengths, batch_size) == pytest.approx(1 - lengths.sum() / positions.mean(), abs=1e-12)


def test_no_padding_is_none():
    assert ordinary_padding(np.full(50_001, 77), 32) == pytest.approx(0, abs=1e-12)
    assert ordinary_padding(np.arange(1, 70_000), 1) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    "changes",
    [{}, {"packing": True}, {"packing": True, "packing_strategy": "wrapped"}, {"gradient_accumulation_steps": 3}],
    ids=str,
)
def test_shares_are_counted_in_the_batches(changes):
    documents = skewed()
    found = jaxpack.inspect(documents, TrainConfig(max_length=256, per_device_train_batch_size=16, **changes))
    for layout, estimate in found.layouts.items():
        assert estimate.config.layout == layout
        batches = Batches(documents, estimate.config)
        padding = [batches[step].segment_ids.reshape(-1) == 0 for step in range(len(batches))]
        assert estimate.padding_share == pytest.approx(np.concatenate(padding).mean())
    assert found.run.config.layout == TrainConfig(**changes).layout
    tokens = {layout: Batches(documents, p.config).tokens_per_step[:-1].mean() for layout, p in found.layouts.items()}
    assert max(tokens.values()) < 1.25 * min(tokens.values())  # all layouts have about as many tokens a step


@pytest.mark.parametrize("layout", ["padding-free", "packed", pytest.param("padded", marks=pytest.mark.slow)])
def test_a_trainer_reports_what_was_predicted(layout):
    tokenizer, documents = bundled()
    config = TrainConfig(max_length=128, max_steps=2).in_layout(layout, 2)
    predicted = jaxpack.inspect(documents, config).run
    result = Trainer(model_for(tokenizer), tokenizer, sample(), config).train()
    assert result.padding_share == predicted.padding_share
    assert result.compiled_shapes == len(predicted.shapes)


def test_all_of_gsm8k_is_as_its_trainer_has_it():
    tokenizer, _ = bundled()
    config = TrainConfig(max_length=512, packing=True)
    trainer = Trainer(model_for(tokenizer), tokenizer, str(beside("gsm8k_train.jsonl")), config)
    found = jaxpack.inspect(trainer.documents, config)
    assert found.run.padding_share == trainer.batches.padding_share
    assert (len(found.lengths), found.untrained) == (7473, 0)
    for estimate in found.layouts.values():
        assert estimate.padding_share == Batches(trainer.documents, estimate.config).padding_share


def test_padding_by_batch_size_is_that_of_an_epoch():
    documents = skewed()
    found = jaxpack.inspect(documents, TrainConfig(max_length=256))
    for size in BATCH_SIZES:
        for layout, padding_free in (("padded", False), ("padding-free", True)):
            config = TrainConfig(
                max_length=256, padding_free=padding_free, per_device_train_batch_size=size, num_train_epochs=1
            )
            assert found.padding[layout][size] == Batches(documents, config).padding_share
    assert all(share < found.padding["padded"][size] for size, share in found.padding[ORDINARY].items())


@pytest.mark.parametrize(("count", "sizes"), [(1, (1,)), (5, (1, 2, 4)), (8, (1, 2, 4, 8))])
def test_little_data_has_no_batch_that_is_larger(count, sizes):
    documents = random_documents(count * [21], masked=0)
    found = jaxpack.inspect(documents, TrainConfig(packing=True))
    assert all(tuple(shares) == sizes for shares in found.padding.values())
    assert found.layouts["padded"].config.per_device_train_batch_size == count
    assert "The data has 1 row, and a step takes 8" in found.recommendation
    text = printed(found)
    assert f"20 to 21  {count}" in text
    assert "0 to 1" not in text.split("documents  ")[0]
    assert len(found.figure().axes[1].lines) == 4


def test_padding_by_batch_size_is_of_a_sample_where_there_are_many(monkeypatch):
    documents = skewed(4000)
    whole = jaxpack.inspect(documents, TrainConfig(max_length=256)).padding
    monkeypatch.setattr("jaxpack.planning.inspect._SAMPLE", 2000)
    sampled = jaxpack.inspect(documents, TrainConfig(max_length=256)).padding
    assert sampled[ORDINARY] == whole[ORDINARY]
    for layout in LAYOUTS:
        assert sampled[layout] != whole[layout]
        np.testing.assert_allclose(list(sampled[layout].values()), list(whole[layout].values()), atol=0.04)


# --- Times ------------------------------------------------------------------------------------------------------------


@functools.cache
def alpaca() -> Documents:
    return drawn_documents(beside("alpaca_lengths.csv"), 4000)


@pytest.mark.one_in(6)
@pytest.mark.parametrize("row", measured_runs(full_finetuning=False), ids=id_of)
def test_tokens_a_second_are_those_that_were_measured(row):
    """Predicts from 4,000 documents drawn from Alpaca's lengths."""
    found = jaxpack.inspect(alpaca(), train_config(case_of(row)), model=with_adapters(row["model"]), gpu="H200").run
    assert found.tokens_per_second == pytest.approx(row["tokens_per_second"], rel=may_be_off(row))
    assert found.padding_share == pytest.approx(row["padding_share"], abs=0.01)  # the orders, so the steps, differ


def gsm8k() -> Documents:
    from bench_training import text_documents

    return text_documents(beside("gsm8k_train.jsonl"))


@pytest.mark.parametrize("documents", [alpaca, pytest.param(gsm8k, marks=pytest.mark.slow)])
def test_the_gain_of_packing_is_that_which_was_measured(documents, monkeypatch):
    """Compares Qwen3-4B on an H200 at 32 padded documents a step with packed rows of as many tokens."""
    monkeypatch.syspath_prepend("benchmarks")
    results = json.loads((ROOT / "benchmarks/results/2026-11-26_h200_layouts.json").read_text())["results"]
    measured = {row["layout"]: row for row in results if documents.__name__ in row["data"]}
    config = TrainConfig(per_device_train_batch_size=32, padding_free=False, remat="full")
    found = jaxpack.inspect(documents(), config, model=qwen(), gpu="H200").layouts
    gain = measured["packed"]["tokens_per_second"] / measured["padded"]["tokens_per_second"]
    assert found["packed"].speedup == pytest.approx(gain, rel=0.15)
    for layout, row in measured.items():
        assert found[layout].config.per_device_train_batch_size == row["rows"]
        assert found[layout].padding_share == pytest.approx(row["padding_share"], abs=0.01)


def test_times_are_those_of_the_steps():
    documents = skewed()
    config = TrainConfig(max_length=256, per_device_train_batch_size=8, num_train_epochs=2, remat="none")
    found = jaxpack.inspect(documents, config, model=qwen(), gpu="H200")
    batches = Batches(documents, config)
    shapes = [StepShape.of_run(qwen(), batches, int(T)) for T in batches.row_lengths]
    steps = [step_seconds(shape, "none", card_named("H200").rates) for shape in shapes]
    assert len(set(steps)) > 1
    run, padded = found.run, found.layouts["padded"]
    assert run.hours_per_epoch == pytest.approx(sum(steps) / 2 / 3600)
    assert run.tokens_per_second * run.hours_per_epoch * 3600 == pytest.approx(batches.documents.num_tokens)
    assert run.speedup == run.tokens_per_second / padded.tokens_per_second
    assert padded.speedup == 1
    assert (run.remat, found.device) == ("none", "H200")


def test_the_gpu_that_is_here_says_how_much_fits(monkeypatch):
    class Gpu(NamedTuple):
        device_kind: str = "NVIDIA H200"
        platform: str = "gpu"

        def memory_stats(self) -> dict[str, int]:
            return {"bytes_limit": 130 * 2**30, "bytes_in_use": 0}

    for module in ("planning.choose", "planning.inspect"):
        monkeypatch.setattr(f"jaxpack.{module}.current_device", Gpu)
    found = jaxpack.inspect(skewed(), TrainConfig(packing=True, max_length=256), model=qwen())
    assert (found.device, found.run.remat) == ("NVIDIA H200", "none")
    assert found.run.tokens_per_second > 0


def test_a_device_without_rates_has_speed_ups_of_positions():
    assert jax.devices()[0].platform != "cpu" or jaxpack.inspect(skewed(), model=qwen()).device is None
    found = jaxpack.inspect(skewed())
    run = found.run
    assert (run.remat, run.tokens_per_second, run.hours_per_epoch, found.device) == (None, None, None, None)
    assert run.speedup == pytest.approx((1 - run.padding_share) / (1 - found.layouts["padded"].padding_share))


def test_what_does_not_fit_says_so():
    config = TrainConfig(per_device_train_batch_size=512, memory_limit=15)
    found = jaxpack.inspect(skewed(2000), config, model=qwen(), gpu="H200")
    padded, free, _ = (found.layouts[layout] for layout in LAYOUTS)
    assert "`memory_limit` must be at least" in padded.refusal
    assert free.refusal is None
    assert padded.tokens_per_second is None
    assert free.tokens_per_second > 0
    assert "does not fit" in printed(found)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {},
            r"The padding-free run fits on H200 \([\d.]+ GiB of [\d.]+ GiB\), and trains on about [\d,]+ tokens a",
        ),
        ({"packing": True, "memory_limit": 1}, r"The packed run does not fit on H200\."),
    ],
    ids=["fits", "does not fit"],
)
def test_the_verdict_comes_first_and_agrees_with_the_figures(changes, sentence):
    config = TrainConfig(max_length=256, per_device_train_batch_size=16, **changes)
    found = jaxpack.inspect(skewed(2000), config, model=qwen(), gpu="H200")
    on_padding, on_times = found.verdict.removesuffix(".").split(". ", 1)
    shares = [round(100 * found.layouts[layout].padding_share, 1) for layout in LAYOUTS]
    said = [float(share) for share in re.findall(r"([\d.]+)% ", on_padding)]
    np.testing.assert_allclose(said, shares, atol=0.51)
    gains = [float(gain) for gain in re.findall(r"\(([\d.]+) x as fast\)", on_padding)]
    np.testing.assert_allclose(gains, [found.layouts[layout].speedup for layout in LAYOUTS[1:]], atol=0.006)
    assert re.match(sentence, f"{on_times}.")
    assert " ".join(printed(found).split()).startswith(found.verdict)


@pytest.mark.parametrize(
    ("lengths", "verdict"),
    [
        (200 * [250, 256], r".* in packed rows \(1.0\d x as fast\): packing gains nothing here\."),
        (5 * [21], "The data fills"),
    ],
)
def test_a_verdict_says_where_packing_gains_nothing(lengths, verdict):
    assert re.match(verdict, jaxpack.inspect(random_documents(lengths)).verdict)


@pytest.mark.parametrize("width", [80, 140])
def test_no_table_is_wider_than_the_screen(width):
    config = TrainConfig(max_length=8192, packing=True, per_device_train_batch_size=128)
    documents = random_documents([*(skewed(2000).lengths * 9).tolist(), 120_000])
    found = jaxpack.inspect(documents, config, model=qwen(), gpu="H200")
    lines = printed(found, width=width).splitlines()
    assert max(map(len, lines)) <= width
    assert not any("…" in line for line in lines)  # rich cuts off what does not fit
    assert any("<- max_length 8,192" in line for line in lines)


def test_moments_in_8_bits_fit_where_those_in_float32_do_not():
    # All of Qwen3-0.6B: parameters and gradients take 2.2 GiB each, moments 4.4 GiB, or 2.0 with the embedding's.
    model = abstract_model(SHAPES["Qwen3-0.6B"], None)
    settings = {"per_device_train_batch_size": 2, "max_length": 256, "remat": "auto", "memory_limit": 9.0}
    for optim, fits in (("adamw", False), ("adamw_8bit", True)):
        found = jaxpack.inspect(skewed(), TrainConfig(optim=optim, **settings), model=model, gpu="H200")
        assert (found.run.refusal is None) == fits
    step, in_8_bits = (
        StepShape.of_run(model, Batches(skewed(), TrainConfig(optim=optim, **settings)))
        for optim in ("adamw", "adamw_8bit")
    )
    assert step_seconds(in_8_bits, "full", card_named("H200").rates) < step_seconds(
        step, "full", card_named("H200").rates
    )


def test_a_mesh_is_predicted_for_cards_that_are_not_here():
    def found(mesh: str, model: Transformer = qwen()) -> Inspection:  # noqa: B008
        config = TrainConfig(packing=True, max_length=512, per_device_train_batch_size=4, mesh=mesh, remat="full")
        return jaxpack.inspect(skewed(4000), config, model=model, gpu="H200")

    alone, copies, shares = (found(mesh) for mesh in ("auto", "data=8", "data=2,fsdp=4"))
    assert (alone.num_devices, copies.num_devices, shares.num_devices) == (1, 8, 8)
    assert alone.run.sent_bytes == 0
    assert copies.run.peak_bytes == pytest.approx(alone.run.peak_bytes, rel=0.02)
    trained = sum(x.size for x in jax.tree.leaves(split_trained(qwen())[1]))
    assert copies.run.sent_bytes == pytest.approx(2 * 7 / 8 * 4 * trained)
    assert shares.run.peak_bytes < 0.6 * alone.run.peak_bytes
    for several in (copies, shares):
        assert several.run.shapes[0][1] == 8 * 4
        assert 5 * alone.run.tokens_per_second < several.run.tokens_per_second < 8.2 * alone.run.tokens_per_second
        assert "fits on each of 8 H200" in several.verdict
        assert "those of each device, and tokens a second of all 8; each sends" in printed(several)
    whole = abstract_model(SHAPES["Qwen3-4B"], None)
    needed = [found(mesh, whole).run.peak_bytes for mesh in ("auto", "fsdp=8")]
    assert needed[1] < needed[0] / 3  # The optimizer's state is in shards, too.


def test_a_mesh_that_cannot_be_is_refused():
    for mesh, gpu, why in (
        ("data=3", None, f"the number of devices, {len(jax.devices())}, got 'data=3'"),
        ("rows=3", "H200", "sizes of the axes data and fsdp such as 'data=4,fsdp=2', got 'rows=3'"),
        ("fsdp=7", "H200", "a size of 'fsdp' that divides the rows of the model's matrices, got 7"),
    ):
        with pytest.raises(InputError, match=r"`mesh` must (have|be)") as caught:
            jaxpack.inspect(skewed(), TrainConfig(mesh=mesh), model=qwen(), gpu=gpu)
        assert why in str(caught.value)


def said_of(gpu: str, model: str = "Qwen3-4B", **changes) -> str:
    """Returns what is printed, in one line, for packed rows of 1,024 tokens on a card."""
    config = TrainConfig(**{"packing": True, "per_device_train_batch_size": 16} | changes)
    return " ".join(printed(jaxpack.inspect(skewed(2000), config, model=with_adapters(model), gpu=gpu)).split())


def test_a_card_says_whether_a_run_fits_and_how_fast_it_is():
    found = jaxpack.inspect(skewed(2000), TrainConfig(packing=True), model=qwen(), gpu="nvidia geforce rtx-4090")
    assert (found.device, found.variants) == ("RTX 4090", ())
    assert found.run.peak_bytes <= found.usable_bytes < 24 / 1.1 * 2**30
    assert 1_000 < found.run.tokens_per_second < 8_000
    said = said_of("4090")
    assert re.search(r'The run fits: with remat "(\w+)", .* take [\d.]+ GiB of the 19.5 GiB that it may use, and', said)
    assert "Times for RTX 4090 are predicted, not measured. They follow from the card's published figures" in said
    assert "they may be off by a quarter or more" in said
    for measured in ("H200", "H100"):
        said = said_of(measured)
        assert f"Times for {measured} are predicted, not measured. They follow from the rates of its kernels." in said
        assert "published" not in said


def test_a_run_that_does_not_fit_on_a_card_gets_no_times():
    said = said_of("RTX 3080", "Qwen3-8B", offload_weights="off")
    assert re.search(
        r"The run does not fit: `gpu` must have .*, got RTX 3080 10GB, on which a run may use 7.9 GiB", said
    )
    assert "`gpu` is taken for RTX 3080 10GB, which has the least memory of the cards with this name" in said
    assert "give RTX 3080 12GB." in said
    assert "Times for" not in said
    assert "`gpu` is taken for" not in said_of("RTX 3080 12GB", "Qwen3-8B")


def test_a_run_that_needs_more_than_jax_takes_says_how_to_get_it():
    asked = "unless you set the environment variable XLA_CLIENT_MEM_FRACTION=0.92"
    full, little = said_of("RTX 4090", "Qwen3-8B"), said_of("RTX 4090", "Qwen3-0.6B", per_device_train_batch_size=2)
    assert "The run fits" in full
    assert "The run fits" in little
    assert asked in full
    assert asked not in little
    assert asked not in said_of("RTX 4090", "Qwen3-8B", memory_limit=20.0)


def test_a_memory_limit_takes_the_place_of_a_cards_memory():
    assert "of the 12.5 GiB that it may use" in said_of("H200", memory_limit=12.5)
    assert "`memory_limit` must be at least" in said_of("H200", memory_limit=1.0)


def test_a_card_that_is_here_and_does_not_report_its_memory_says_that(monkeypatch):
    class Gpu(NamedTuple):
        device_kind: str = "NVIDIA GeForce RTX 4090"
        platform: str = "gpu"

        def memory_stats(self) -> None:
            return None

    for module in ("planning.choose", "planning.inspect"):
        monkeypatch.setattr(f"jaxpack.{module}.current_device", Gpu)
    found = jaxpack.inspect(skewed(), TrainConfig(packing=True, max_length=256), model=qwen())
    assert (found.device, found.run.remat, found.usable_bytes) == ("NVIDIA GeForce RTX 4090", "full", None)
    said = " ".join(printed(found).split())
    assert "Its free memory is not known, so remat is full: `--memory-limit` sets the memory." in said
    assert "published figures" in said


def test_a_card_that_is_not_known_is_refused():
    with pytest.raises(InputError, match="`gpu` must be the name of a known card, got 'A1000'"):
        jaxpack.inspect(skewed(), gpu="A1000")
    with pytest.raises(InputError, match='`gpu` must be the name of a card, such as "RTX 4090", got 4090'):
        jaxpack.inspect(skewed(), gpu=4090)


# --- Truncation -------------------------------------------------------------------------------------------------------


def test_what_is_cut_off_is_counted():
    documents = random_documents([10, 100, 40, 50], masked=0)
    documents.labels[:10] = -100  # the first is not trained on; the last is, but only beyond 32
    documents.labels[150:185] = -100
    found = jaxpack.inspect(documents, TrainConfig(max_length=32))
    assert (found.num_tokens, found.num_targets, found.untrained) == (200, 99 + 39 + 15, 1)
    assert found.truncation == (cut := Batches(documents, TrainConfig(max_length=32)).truncation)
    assert (cut.documents, cut.tokens, cut.dropped) == (3, 68 + 8 + 18, 2)
    assert found.targets_lost == 68 + 8 + 15
    text = printed(found)
    assert "3 documents: 94 of all tokens are lost (47%), and 91 of the tokens to train on (59%)" in text
    dropped = "; after the cut at max_length, 2 are without one and are dropped"
    assert f"1 document without a token to train on{dropped}" in text
    advice = "But `--max-length 32` cuts off 47% of all tokens and 59% of the tokens to train on: 128 would"
    assert advice in found.recommendation


def test_what_is_split_is_not_cut():
    config = TrainConfig(max_length=32, packing=True, packing_strategy="bfd_split")
    found = jaxpack.inspect(random_documents([10, 100, 40, 50], masked=0), config)
    assert found.truncation.tokens == found.targets_lost == 0
    assert "But" not in found.recommendation


# --- Advice -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lengths", "max_length", "advice"),
    [
        (200 * [250, 256], 1024, ["Packing gains nothing here: padded batches of 8 documents are 1.2% padding"]),
        (300 * [64, 64, 512], 1024, ["Pack the documents (`--packing --per-device-train-batch-size 2`): padded"]),
        (100 * [40, 40, 40, 350], 1024, ["Padding-free batches, the default, are enough: padded"]),
        (
            100 * [620, 300, 620],
            1024,
            ["Stay with padding-free batches, the default: padded", "a larger `--max-length`"],
        ),
        (
            100 * [60, 100, 60, 130],
            130,
            ["Stay with padding-free batches, the default: padded", "a row of 130 tokens takes 256 positions; choose"],
        ),
        (
            100 * [530],
            1024,
            ["Stay with padding-free batches, the default: padded", "a larger `--max-length`"],
        ),  # rows of 640
        (5 * [21], 1024, ["The data has 5 documents, and a step takes 8: the rest of the step is padding"]),
    ],
)
def test_the_advice_goes_by_what_is_fastest(lengths, max_length, advice):
    found = jaxpack.inspect(random_documents(lengths), TrainConfig(max_length=max_length))
    assert found.recommendation.startswith(advice[0])
    assert advice[-1] in found.recommendation
    assert "cuts off" not in found.recommendation


# --- How it is shown --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [[1], [7, 7], [1, 5000], list(range(1, 900)), 99 * [50] + [100_000]], ids=len)
def test_a_histogram_holds_every_document_once(lengths):
    edges, counts = histogram(np.array(lengths))
    assert counts.sum() == len(lengths)
    assert len(counts) == len(edges) - 1 <= 17
    assert (np.diff(edges) > 0).all()
    assert edges[-1] > max(lengths)


def test_the_picture_shows_the_figures():
    found: Inspection = jaxpack.inspect(skewed(), TrainConfig(max_length=128))
    lengths, padding = found.figure().axes
    heights = [int(bar.get_height()) for bar in lengths.patches]
    assert heights == histogram(found.lengths, 40)[1][: len(heights)].tolist()
    assert sum(heights) > 290
    for line, shares in zip(padding.lines, found.padding.values(), strict=True):
        np.testing.assert_allclose(line.get_ydata(), [100 * share for share in shares.values()])


def test_the_tables_hold_the_figures():
    found = jaxpack.inspect(skewed(), TrainConfig(max_length=128, packing=True), model=qwen(), gpu="H100")
    text = printed(found)
    for estimate in found.layouts.values():
        assert f"{estimate.tokens_per_second:,.0f}" in text
        assert f"{estimate.speedup:.2f} x" in text
    assert "packed *" in text
    assert "<- max_length 128" in text
    assert "Times for H100 are predicted, not measured. They follow from the rates of its kernels." in text
    assert text.rstrip().replace("\n", " ").endswith(found.recommendation[-40:])
