"""Tests that a checkpoint is whole, fits one run alone, and lets the run go on as if it had not stopped."""

import dataclasses
import datetime
import json
import logging
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from models import random_documents, small_model
from tensorboard_events import expected_scalars, scalars
from tokenizers_for_tests import small_tokenizer

from jaxpack.errors import InputError, TrainingError
from jaxpack.model.lora import adapters
from jaxpack.model.transformer import Transformer
from jaxpack.model.weights import Frozen
from jaxpack.optimizers.optimizer import make_optimizer
from jaxpack.settings import LoraConfig, TrainConfig
from jaxpack.train import checkpoint
from jaxpack.train.checkpoint import Checkpoints, Progress, checksums, identity_of, load_checkpoint, steps_in
from jaxpack.train.progress import Log
from jaxpack.train.run import Run
from jaxpack.train.step import Metrics, TrainState
from jaxpack.train.trainer import Trainer, TrainResult

DAY = datetime.date(2031, 2, 3)
LORA = LoraConfig(r=4, lora_dropout=0.2)
ROWS = [{"input_ids": np.random.default_rng(i).integers(0, 97, 2 + 7 * i % 60).tolist()} for i in range(40)]
CONFIG = TrainConfig(
    max_length=64,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=2,
    max_steps=8,
    learning_rate=1e-2,
    lr_scheduler_type="cosine",
    save_steps=3,
)


def trainer(output: Path | None, model: Transformer | None = None, rows: list = ROWS, **changes: object) -> Trainer:
    output_dir = None if output is None else str(output)
    config = dataclasses.replace(CONFIG, output_dir=output_dir, **changes)
    return Trainer(small_model("qwen3", lora=LORA) if model is None else model, None, rows, config)


class Killed(BaseException):
    """Ends a run without a chance to save its state, as SIGKILL does; unlike an exception, which saves it."""


def crash(training: Trainer, after: int) -> None:
    """Trains, and is killed when the metrics of a step are read."""
    step = Log.step

    def fail(log: Log, metrics: Metrics) -> dict[str, float]:
        measured = step(log, metrics)
        if len(log._done.losses) == after:
            raise Killed
        return measured

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Log, "step", fail)
        with pytest.raises(Killed):
            training.train()


def weights(model: Transformer) -> dict[tuple, np.ndarray]:
    return {
        path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Any(nnx.Param, Frozen)))
    }


def require_same(result: TrainResult, model: Transformer, expected: TrainResult, trained: Transformer) -> None:
    np.testing.assert_array_equal(result.losses, expected.losses)
    assert result.evaluations == expected.evaluations
    for (path, got), want in zip(weights(model).items(), weights(trained).values(), strict=True):
        np.testing.assert_array_equal(got, want, err_msg=str(path))


# --- Going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "lora"),
    [
        pytest.param({}, dataclasses.replace(LORA, layers_to_transform=1), id="padding_free", marks=pytest.mark.slow),
        pytest.param({"packing": True, "neftune_noise_alpha": 5}, LORA, id="packed", marks=pytest.mark.slow),
        pytest.param({"weight_decay": 0.1, "warmup_steps": 3}, None, id="full", marks=pytest.mark.slow),
        pytest.param(
            {"packing": True, "optim": "adamw_8bit"},
            LoraConfig(r=96, target_modules="q_proj"),
            id="8bit",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_resumed_run_is_the_undisturbed_one(changes: dict, lora: LoraConfig | None, tmp_path: Path) -> None:
    def begin(name: str, **more: object) -> Trainer:
        return trainer(tmp_path / name, small_model("qwen3", lora=lora), logging_steps=2, **changes, **more)

    whole = begin("whole")
    expected = whole.train()
    crash(begin("run", report_to="tensorboard"), after=7)
    assert steps_in(tmp_path / "run" / "checkpoints") == [3, 6]
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "loss":')  # the run was killed in the middle of a line
    resumed = begin("run", report_to="tensorboard", resume_from_checkpoint="latest")
    require_same(resumed.train(), resumed.model, expected, whole.model)
    assert scalars(tmp_path / "run") == expected_scalars(tmp_path / "run")
    found, records = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("run", "whole")
    )
    for name in ("step", "epoch", "loss", "grad_norm", "learning_rate", "padding_share"):
        assert [record[name] for record in found] == [record[name] for record in records]
    assert all(record["tokens_per_second"] > 0 for record in found)


def test_a_run_can_go_on_in_another_folder(stopped: Path, tmp_path: Path) -> None:
    checkpoint = stopped / "checkpoints" / "3"
    for choice in (stopped, stopped / "checkpoints", checkpoint):
        assert trainer(tmp_path, resume_from_checkpoint=str(choice)).checkpoint == checkpoint
    result = trainer(tmp_path, resume_from_checkpoint=str(checkpoint)).train()
    assert len(result.losses) == 8
    assert steps_in(tmp_path / "checkpoints") == [6, 8]
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [8]


def test_without_a_checkpoint_latest_is_the_beginning(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    crash(trainer(tmp_path), after=2)
    result = trainer(tmp_path, resume_from_checkpoint="latest").train()
    assert len(result.losses) == 8
    assert f"there is no checkpoint in {tmp_path}: the run starts from the beginning" in capsys.readouterr().err


@pytest.mark.slow
def test_the_trainer_of_a_run_that_was_stopped_goes_on_like_a_new_one(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole")
    expected = whole.train()
    again = trainer(tmp_path / "run", resume_from_checkpoint="latest", logging_steps=1)
    crash(again, after=5)
    require_same(again.train(), again.model, expected, whole.model)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 9))

    once = trainer(tmp_path / "once")
    crash(once, after=5)
    with pytest.raises(InputError, match="`output_dir` must not hold checkpoints/"):
        once.train()
    assert steps_in(tmp_path / "once" / "checkpoints") == [3]


def test_no_checkpoint_makes_way_for_one_that_is_no_number(tmp_path: Path) -> None:
    training = trainer(tmp_path, save_steps=1, learning_rate=1e30, lr_scheduler_type="constant")
    with pytest.raises(TrainingError, match=r"hold NaN or infinity: the loss of step \d is nan"):
        training.train()
    last = steps_in(tmp_path / "checkpoints")[-1]
    assert 0 < last == training.steps_in_model == len(training.progress.losses) < 7
    assert np.isfinite(training.progress.losses).all()


def test_a_run_that_has_ended_has_nothing_left_to_do(tmp_path: Path) -> None:
    done = trainer(tmp_path, save_steps=5)
    expected = done.train()
    again = trainer(tmp_path, resume_from_checkpoint="latest")
    result = again.train()
    require_same(result, again.model, expected, done.model)
    assert result.tokens_per_second == 0


# --- What is refused --------------------------------------------------------------------------------------------------


def other_weights(model: Transformer) -> Transformer:
    weight = model.norm.scale
    weight.set_value(weight[...].at[3].multiply(1 + 2**-20))
    return model


OTHERS: dict[str, tuple[Callable[[], dict], list[str]]] = {
    "setting": (lambda: {"learning_rate": 0.02, "seed": 7}, ["`learning_rate` 0.01 (here 0.02)", "`seed` 42 (here 7)"]),
    "optim": (lambda: {"optim": "adamw_8bit"}, ["`optim` 'adamw' (here 'adamw_8bit')"]),
    "steps": (lambda: {"max_steps": 9}, ["`max_steps` 8 (here 9)"]),
    "rows": (lambda: {"rows": [*ROWS[:-1], {"input_ids": [1, 2]}]}, ["`train_dataset` '40 documents of"]),
    "alpha": (
        lambda: {"model": small_model("qwen3", lora=dataclasses.replace(LORA, lora_alpha=8.0))},
        ["`adapters' lora_alpha` 32 (here 8.0)"],
    ),
    "no_adapters": (lambda: {"model": small_model("qwen3")}, ["`adapters' r` 4 (here None)"]),
    "family": (
        lambda: {"model": small_model("llama", lora=LORA)},
        ["`architecture` 'Qwen3ForCausalLM' (here 'LlamaForCausalLM')"],
    ),
    "dtype": (lambda: {"model": small_model("qwen3", lora=LORA, dtype=jnp.bfloat16)}, ["`frozen ", "bfloat16"]),
    "weights": (lambda: {"model": other_weights(small_model("qwen3", lora=LORA))}, ["`frozen norm.scale`"]),
}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopped")
    crash(trainer(folder), after=4)
    return folder


@pytest.mark.parametrize("name", OTHERS)
def test_a_checkpoint_of_another_run_is_refused_by_what_differs(name: str, stopped: Path) -> None:
    make, fragments = OTHERS[name]
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    training = trainer(stopped, resume_from_checkpoint="latest", **make())
    untrained = weights(training.model)
    with pytest.raises(
        InputError, match=r"`resume_from_checkpoint` must be a checkpoint of the same run, got '.*/3' with"
    ) as error:
        training.train()
    for fragment in fragments:
        assert fragment in str(error.value)
    for path, array in weights(training.model).items():
        np.testing.assert_array_equal(array, untrained[path])
    assert {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()} == before


def test_what_changes_no_number_may_differ(
    stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(stopped / "checkpoints" / "3")
    free = {"logging_steps": 1, "save_steps": 1, "save_total_limit": 1, "remat": "none"}
    monkeypatch.delattr(Run, "compile")  # compiling would come next
    with pytest.raises(AttributeError, match="compile"):
        trainer(tmp_path, resume_from_checkpoint=path, compilation_cache_dir="none", **free).train()
    shown = capsys.readouterr().err
    assert "the checkpoint was written with remat full, not none: losses may differ by rounding" in shown
    assert f"the run continues from {path}: 3 of 8 steps are done" in shown


def test_places_that_are_no_checkpoints_are_refused(stopped: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="`resume_from_checkpoint` must be the folder of a checkpoint"):
        trainer(tmp_path, resume_from_checkpoint=str(tmp_path))
    with pytest.raises(InputError, match="`output_dir` must not hold checkpoints/"):
        trainer(stopped)
    rule = r"must be the folder of a checkpoint or of a run if `output_dir` is not set \(.*\), got 'latest'"
    with pytest.raises(InputError, match=rule):
        trainer(None, resume_from_checkpoint="latest")


def test_adapters_are_the_same_however_they_are_written() -> None:
    def adapted(**lora: object) -> dict:
        model = small_model("qwen3", lora=LoraConfig(r=4, **lora))
        return identity_of(model, CONFIG, small_state(), nnx.State({}), train_dataset=None)

    one = adapted(target_modules=("q_proj", "v_proj"), rank_pattern="q_proj=2,v_proj=8")
    assert one == adapted(target_modules=("v_proj", "q_proj"), rank_pattern="v_proj=8,q_proj=2")
    assert one != adapted(target_modules=("q_proj", "v_proj"), rank_pattern="q_proj=8,v_proj=2")
    assert adapted() == adapted(target_modules=tuple(adapters(small_model("qwen3", lora=LORA))))
    assert adapted() == adapted(target_modules=r".*_proj") == adapted(layers_to_transform="0-1")
    in_one = adapted(target_modules="q_proj,v_proj", layers_to_transform="1", exclude_modules="v_proj")
    assert in_one == adapted(target_modules=r".*\.1\.self_attn\.q_proj")
    assert in_one != adapted(target_modules="layers.0.self_attn.q_proj")


# Names in the checkpoints of version 0.1.0. Its runs can go on as long as the names stay the same.
FROZEN_NAMES = [
    *("embedding", "lm_head", "norm.scale", "blocks.attention_norm.scale", "blocks.feed_forward_norm.scale"),
    *("blocks.attention.qkv.weight", "blocks.attention.out.weight"),
    *("blocks.feed_forward.gate_up.weight", "blocks.feed_forward.down.weight"),
]
ADAPTERS = {
    "attention.qkv": ("q_proj", "k_proj", "v_proj"),
    "attention.out": ("o_proj",),
    "feed_forward.gate_up": ("gate_proj", "up_proj"),
    "feed_forward.down": ("down_proj",),
}


def test_the_names_in_a_checkpoint_are_those_of_the_first_version() -> None:
    training = trainer(None, small_model("llama", lora=LoraConfig(r=4)))
    run = Run(training.model, training.batches, training.config)
    identity = identity_of(training.model, training.config, run.state, run.frozen)
    factors = [
        f"blocks.{linear}.lora.{name}.lora_{side}"
        for linear, names in ADAPTERS.items()
        for name in names
        for side in "ab"
    ]
    moments = [f"optimizer.1.0.{moment}.{factor}" for moment in ("mu", "nu") for factor in factors]
    arrays = [*(f"trainable.{factor}" for factor in factors), *moments, "step"]
    arrays += ["optimizer.1.0.count", "optimizer.1.2.count"]
    assert {name for name in identity if name.startswith("array ")} == {f"array {name}" for name in arrays}
    assert {name for name in identity if name.startswith("frozen ")} == {f"frozen {name}" for name in FROZEN_NAMES}


def test_checkpoints_from_before_a_setting_go_on_with_the_value_that_it_had() -> None:
    def identity(**changes: object) -> dict:
        training = trainer(None, **changes)
        return identity_of(training.model, training.config, small_state(), nnx.State({}), train_dataset=None)

    added = {"optim", "num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "router_bias"}
    added |= {
        "optim_args",
        "lr_scheduler_kwargs",
        "loraplus_lr_ratio",
        "label_smoothing_factor",
        "z_loss_coef",
        "neftune_noise_alpha",
        f"{checkpoint.ADAPTERS}use_dora",
        "experts_bias",
        "attention_sinks",
        "router_aux_loss_coef",
        "completion_only_loss",
        "instruction_part",
        "response_part",
    }
    older = {name: value for name, value in identity().items() if name not in added}
    assert len(older) == len(identity()) - len(added)
    checkpoint._require_same(Path("3"), older, identity())
    with pytest.raises(InputError, match=r"with `optim` 'adamw' \(here 'adamw_8bit'\)\."):
        checkpoint._require_same(Path("3"), older, identity(optim="adamw_8bit"))


def test_two_halves_of_documents_of_one_length_are_two_datasets() -> None:
    documents = random_documents(8 * [20])
    first, second = documents[np.arange(0, 8, 2)], documents[np.arange(1, 8, 2)]
    assert checkpoint._describe(first) != checkpoint._describe(second)


def test_checksums_see_values_and_places() -> None:
    x = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
    variants = [x, x[::-1], x[:, ::-1], x[..., ::-1], x.swapaxes(0, 1), np.nextafter(x, np.float32(100))]
    variants += [x.astype(jnp.bfloat16), x.reshape(60), np.float32(3)]
    sums = checksums([jnp.asarray(variant) for variant in variants])
    assert len(set(sums.tolist())) == len(variants)
    np.testing.assert_array_equal(checksums([jnp.array(x)]), sums[:1])


# --- Writing ----------------------------------------------------------------------------------------------------------


def small_state(value: float = 0.0) -> TrainState:
    return TrainState(nnx.State({"a": jnp.full((3, 5), value)}), {"mu": jnp.arange(4.0) + value}, jnp.int32(value))


def test_a_run_keeps_the_date_of_its_first_start(tmp_path: Path) -> None:
    tokenizer = small_tokenizer(chat=True)
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + tokenizer.chat_template
    rows = [{"messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "the"}]}] * 4

    def dated(**changes: object) -> Trainer:
        model = small_model("qwen3", lora=LORA, vocab_size=len(tokenizer))
        config = dataclasses.replace(CONFIG, output_dir=str(tmp_path), max_steps=3, **changes)
        return Trainer(model, tokenizer, rows, config)

    first = dated(chat_template_date="2031-02-03")
    assert first.date == DAY
    assert "03 Feb 2031" in tokenizer.decode(first.documents.tokens.tolist())
    first.train()
    again = dated(resume_from_checkpoint="latest")
    assert again.date == DAY
    np.testing.assert_array_equal(again.documents.tokens, first.documents.tokens)
    again.train()
    other = dated(resume_from_checkpoint="latest", chat_template_date="2031-02-04")
    with pytest.raises(InputError, match="must be a checkpoint of the same run"):
        other.train()
    assert trainer(None).date == datetime.date.today()


def progress_of(step: int, evaluations: dict[int, float] | None = None) -> Progress:
    return Progress([1 / (1 + i) for i in range(step)], evaluations or {})


@pytest.fixture
def checkpoints(tmp_path: Path) -> Iterator[Checkpoints]:
    opened = Checkpoints(str(tmp_path), 2, {"learning_rate": 1.0}, {"device": "cpu"}, DAY)
    yield opened
    opened.close()


def load(folder: Path, state: TrainState | None = None) -> tuple[TrainState, Progress]:
    state = small_state() if state is None else state
    path, state, progress = load_checkpoint([folder], state, {"learning_rate": 1.0}, {"device": "cpu"}, 10)
    assert path == folder
    return state, progress


def test_moments_in_8_bits_are_kept_to_the_bit(checkpoints: Checkpoints, tmp_path: Path) -> None:
    optimizer = make_optimizer(TrainConfig(optim="adamw_8bit"), optax.constant_schedule(1e-2))
    trainable = nnx.State({"blocks": {"weight": nnx.Param(jnp.ones((2, 70, 90)))}, "a": nnx.Param(jnp.ones(5))})
    start = TrainState(trainable, optimizer.init(trainable), jnp.int32(0))
    gradients = jax.tree.map(lambda x: jax.random.normal(jax.random.key(0), x.shape), trainable)
    _, state = optimizer.update(gradients, start.optimizer, trainable)
    saved = jax.tree.map(np.array, TrainState(gradients, state, jnp.int32(3)))
    checkpoints.save(3, saved, progress_of(3))
    checkpoints.wait()
    loaded, _ = load(tmp_path / "checkpoints" / "3", start)
    names = {name: array.dtype for name, array in checkpoint.arrays_by_name(loaded).items()}
    assert names["optimizer.1.0.nu.blocks.weight.codes"] == jnp.uint8
    for got, want in zip(jax.tree.leaves(loaded), jax.tree.leaves(saved), strict=True):
        np.testing.assert_array_equal(got, want, strict=True)


@pytest.mark.parametrize(
    ("losses", "kept"),
    [
        ({}, [5, 6]),
        ({2: 1.0, 3: 2.0, 4: 1.5, 6: 3.0}, [2, 5, 6]),
        ({3: 1.0, 5: 0.5}, [5, 6]),
        ({2: float("nan"), 3: 2.0}, [3, 5, 6]),
    ],
)
def test_the_last_and_the_best_are_kept(losses: dict, kept: list, checkpoints: Checkpoints) -> None:
    for step in range(1, 7):
        checkpoints.save(step, small_state(step), progress_of(step, {s: x for s, x in losses.items() if s <= step}))
    assert checkpoints.wait()
    assert sorted(int(path.name) for path in checkpoints.folder.iterdir()) == kept
    for step in kept:
        state, progress = load(checkpoints.folder / str(step))
        jax.tree.map(np.testing.assert_array_equal, state, small_state(step))
        assert progress.losses == progress_of(step).losses


def test_all_are_kept_without_a_limit(tmp_path: Path) -> None:
    opened = Checkpoints(str(tmp_path), None, {"learning_rate": 1.0}, {"device": "cpu"}, DAY)
    for step in range(1, 5):
        opened.save(step, small_state(step), progress_of(step))
    opened.close()
    assert sorted(path.name for path in opened.folder.iterdir()) == ["1", "2", "3", "4"]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers_are_not_saved_whatever_the_loss_was(
    value: float, dtype: jnp.dtype, checkpoints: Checkpoints, capsys: pytest.CaptureFixture
) -> None:
    checkpoints.save(1, small_state(1), progress_of(1))
    for where in ("trainable", "optimizer"):
        tree = getattr(small_state(2), where)
        spoilt = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 2, dtype).at[(-1,) * leaf.ndim].set(value), tree)
        state = small_state(2)._replace(**{where: spoilt})
        checkpoints.save(2, state, progress_of(2))
        assert not checkpoints.wait()
        assert steps_in(checkpoints.folder) == [1]
        said = capsys.readouterr().err
        assert f"step 2 is not saved: `{where}." in said
        assert "` has values that are not finite, and no run can continue from that" in said


@pytest.mark.parametrize(("value", "saved"), [(np.inf, True), (-np.inf, True), (np.nan, False)])
def test_an_optimizer_may_begin_with_an_infinite_best_loss(value: float, saved: bool, checkpoints: Checkpoints) -> None:
    optimizer = {"best_value": jnp.float32(value), "largest": jnp.float32(jnp.finfo(jnp.float32).max)}
    checkpoints.save(2, small_state(2)._replace(optimizer=optimizer), progress_of(2))
    assert checkpoints.wait() == saved


def test_a_loss_that_was_no_number_before_is_no_fault_of_the_weights(checkpoints: Checkpoints) -> None:
    checkpoints.save(2, small_state(2), Progress([np.inf, 0.5]))
    assert checkpoints.wait()
    assert steps_in(checkpoints.folder) == [2]


def test_a_save_does_not_wait_for_the_disk_and_keeps_what_it_was_given(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, begun, proceed = checkpoint._write, threading.Event(), threading.Event()

    def wait(*args: object) -> None:
        begun.set()
        assert proceed.wait(60)
        write(*args)

    monkeypatch.setattr(checkpoint, "_write", wait)
    state = small_state(3)
    checkpoints.save(3, state, progress_of(3))
    assert begun.wait(60)
    assert steps_in(checkpoints.folder) == []
    jax.block_until_ready(jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)(state))
    proceed.set()
    assert checkpoints.wait()
    jax.tree.map(np.testing.assert_array_equal, load(checkpoints.folder / "3")[0], small_state(3))


def test_what_a_killed_process_left_is_deleted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    left = ("4.orbax-checkpoint-tmp", "5.unfinished.orbax-checkpoint-tmp", "6.unfinished", "2.deleted")
    for name in (*left, "3"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints" / "7.unfinished").symlink_to(tmp_path / "checkpoints" / "3")
    Checkpoints(str(tmp_path), 2, {}, {}, DAY).close()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["3"]
    said = capsys.readouterr().err
    assert [f"wrote the checkpoint of step {step}: its files are deleted" in said for step in range(2, 8)] == [
        *(False, False),
        *4 * [True],
    ]


def test_what_cannot_be_saved_is_told_and_the_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = checkpoint._write

    def refused(path: Path, *args: object) -> None:
        if path.name == "6":
            path = path.parent / "file" / "6"
            path.parent.touch()
        write(path, *args)

    monkeypatch.setattr(checkpoint, "_write", refused)
    training = trainer(tmp_path, save_steps=2)
    result = training.train()
    assert len(result.losses) == 8
    assert steps_in(tmp_path / "checkpoints") == [4, 8]
    shown = capsys.readouterr().err
    assert f"step 6 could not be saved in {tmp_path}/checkpoints/6: Not a directory; the run goes on" in shown


@pytest.mark.parametrize("spare", [checkpoint._SPARE, -(2**30)], ids=["seen_before", "seen_by_orbax"])
def test_a_full_disk_costs_a_checkpoint_and_nothing_else(
    spare: int, small_disk: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, ballast = Checkpoints._write, small_disk / "ballast"

    def fill(self: Checkpoints, step: int, *args: object) -> bool:
        if step == 4:
            ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - 100_000))
        elif step == 8:
            ballast.unlink()
        return write(self, step, *args)

    monkeypatch.setattr(Checkpoints, "_write", fill)
    monkeypatch.setattr(checkpoint, "_SPARE", spare)
    output = small_disk / "run"
    result = trainer(output, save_steps=2, save_total_limit=5).train()
    assert len(result.losses) == 8
    assert steps_in(output / "checkpoints") == [2, 8]
    shown = capfd.readouterr().err
    for step in (4, 6):
        assert f"/{step}: No space left on device; the run goes on" in shown
    assert "Traceback" not in shown
    assert [path.name for path in (output / "checkpoints").iterdir() if not path.name.isdecimal()] == []


def test_tasks_that_orbax_forgets_are_not_told_of_and_others_are(caplog):
    logger = logging.getLogger("asyncio")
    with checkpoint._quiet():
        pass
    for place in ("site-packages/orbax/writer.py", "site-packages/other/writer.py"):
        try:
            exec(compile("raise OSError('the disk is full')", place, "exec"))
        except OSError:
            logger.exception("Task exception was never retrieved")
    assert len(caplog.records) == 1
    assert "other/writer.py" in caplog.text
