"""Tests that a run compiles its programs in time, keeps the device busy, and evaluates what it has learned."""

import functools
import itertools
import threading
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import small_model
from short_runs import LORA, ROWS, SHORT, changed

from jaxpack.cli.demo import sample
from jaxpack.data.packing import PackedBatch
from jaxpack.errors import InputError
from jaxpack.settings import LoraConfig, TrainConfig
from jaxpack.train.programs import Programs
from jaxpack.train.progress import Log
from jaxpack.train.run import Run
from jaxpack.train.step import Metrics, temporary_bytes
from jaxpack.train.trainer import Trainer, TrainResult
from jaxpack.utils.compilation_cache import ProgramCache

OUT_OF_MEMORY = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 4.55GiB")


def test_the_shapes_of_a_run_are_compiled_and_no_other(monkeypatch):
    trainer = Trainer(
        small_model("qwen3", lora=LORA),
        None,
        ROWS,
        changed(SHORT, packing=False, max_steps=20, per_device_train_batch_size=8),
    )
    assert 1 < len(trainer.batches.shapes) <= 4
    compiled = []
    lower = jax.stages.Lowered.compile
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda *args: compiled.append(args) or lower(*args))
    result = trainer.train()
    assert len(compiled) == result.compiled_shapes == len(trainer.batches.shapes)


LAYOUTS = [{"packing": True}, {"packing": False}, {"packing": False, "padding_free": False}]


@pytest.mark.parametrize(
    "layout", [LAYOUTS[0], *(pytest.param(layout, marks=pytest.mark.slow) for layout in LAYOUTS[1:])], ids=str
)
def test_nothing_compiles_in_an_epoch_of_gsm8k_after_its_first_step(layout, monkeypatch, tmp_path):
    rows = [{"input_ids": [1 + i % 96 for i in range(len("".join(row.values())) // 16)]} for row in sample()]
    config = TrainConfig(max_length=128, per_device_train_batch_size=12, num_train_epochs=1, logging_steps=1, **layout)
    config = changed(config, output_dir=str(tmp_path), eval_steps=2, save_steps=4)
    trainer = Trainer(small_model("qwen3", lora=LORA), None, rows, config, rows[:12])
    here: list[str] = []  # all that XLA compiles in this thread, also small programs between the steps
    beside: list[str] = []  # programs that are compiled in the run's own thread
    by_step: list[int] = []
    thread = threading.get_ident()

    def count(event: str, _: float, **about: object) -> None:
        # The search for NaN is compiled when a checkpoint is first saved.
        if event == "/jax/core/compile/backend_compile_duration" and "_all_finite" not in str(about.get("fun_name")):
            (here if threading.get_ident() == thread else beside).append(event)

    log_step = Log.step
    monkeypatch.setattr(Log, "step", lambda *args: (log_step(*args), by_step.append(len(here)))[0])
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        trainer.train()
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert len(by_step) == trainer.batches.steps_per_epoch > 5
    assert len(beside) == len(trainer.batches.shapes) + len(trainer.eval_batches[""].shapes)
    assert by_step[-1] == len(here) == by_step[0]


@pytest.mark.parametrize("save_steps", [0, 3])
def test_the_host_reads_nothing_in_the_loop_but_the_metrics_of_the_step_before(save_steps, monkeypatch, tmp_path):
    """A read waits for the step that computes the value.

    So the host starts each step but the second before it reads the metrics of the step before. It reads the state only
    to save it.
    """
    config = changed(SHORT, logging_steps=1, output_dir=str(tmp_path), save_steps=save_steps)
    trainer = Trainer(small_model("qwen3", lora=LORA), None, ROWS, config)
    events: list[tuple[str, object]] = []
    metrics_of: dict[int, int] = {}  # by id of the array; `started` keeps the arrays alive, so ids stay unique
    started = []
    run = jax.stages.Compiled.__call__

    def start(program, *args):
        state, metrics = run(program, *args)
        metrics_of.update((id(leaf), len(started)) for leaf in metrics)
        events.append(("start", len(started)))
        started.append((state, metrics))
        return state, metrics

    def reading(read):
        def spy(x, *args, **options):
            if any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(x)):
                events.append(("read", metrics_of.get(id(x), "something else")))
            return read(x, *args, **options)

        return spy

    monkeypatch.setattr(jax.stages.Compiled, "__call__", start)
    kind = type(jnp.zeros(()))
    monkeypatch.setattr(kind, "_value", property(reading(kind._value.fget)))  # float(x), x.item(), device_get
    for owner, name in (
        (kind, "block_until_ready"),
        (jax, "block_until_ready"),  # for several arrays, it bypasses the method
        (np, "asarray"),  # on a CPU, it reads the buffer directly
        (np, "array"),
    ):
        monkeypatch.setattr(owner, name, reading(getattr(owner, name)))
    trainer.train()
    monkeypatch.undo()

    loop = events[events.index(("start", 0)) :]
    steps = trainer.batches.num_steps
    expected: list[tuple[str, object]] = []
    waiting: list[tuple[str, object]] = []
    for step in range(steps):
        expected += [("start", step), *waiting]
        waiting = [("read", step)]
        if save_steps and ((step + 1) % save_steps == 0 or step + 1 == steps):
            expected += [*waiting, ("read", "something else")]
            waiting = []
        elif step == 0:
            expected += waiting
            waiting = []
    expected += waiting
    if not save_steps:
        expected.append(("read", "something else"))  # whether the weights after the last step are finite
    assert [event for event, _ in itertools.groupby(loop)] == expected


def test_a_second_start_finds_its_programs_and_does_the_same(tmp_path, capsys):
    config = changed(SHORT, max_steps=3, compilation_cache_dir=str(tmp_path))
    begin = time.perf_counter()
    first, second = (Trainer(small_model("qwen3", lora=LORA), None, ROWS, config).train() for _ in range(2))
    both = time.perf_counter() - begin
    assert (first.found_programs, second.found_programs) == (0, second.compiled_shapes)
    np.testing.assert_array_equal(first.losses, second.losses)
    for result in (first, second):
        assert 0 < result.compile_seconds < result.first_step_seconds
    assert first.first_step_seconds + second.first_step_seconds < both
    shown = capsys.readouterr().err
    assert shown.count(f"compiled programs are kept in {tmp_path} for later runs (") == 2
    assert "0 of 1 were found compiled" in shown
    assert "1 of 1 were found compiled" in shown
    seconds = f"{second.first_step_seconds:.1f} s, of which compiling took {second.compile_seconds:.1f} s"
    assert f"the first step ended after {seconds}" in shown


def test_a_run_goes_on_where_programs_cannot_be_kept(tmp_path, capsys):
    (tmp_path / "file").touch()
    config = changed(SHORT, max_steps=2, compilation_cache_dir=str(tmp_path / "file"))
    result = Trainer(small_model("qwen3", lora=LORA), None, ROWS, config).train()
    assert len(result.losses) == 2
    assert f"compiled programs cannot be kept in {tmp_path}/file: Not a directory" in capsys.readouterr().err


@pytest.mark.parametrize("layout", [LAYOUTS[0], pytest.param(LAYOUTS[1], marks=pytest.mark.slow), LAYOUTS[2]], ids=str)
def test_evaluation_is_the_mean_over_the_targets_of_each_document_alone(layout):
    model = small_model("qwen3", lora=LoraConfig(r=4, lora_dropout=0.5))
    rows = [{"input_ids": row["input_ids"], "labels": [-100, *row["input_ids"][1:]]} for row in ROWS[:13]]
    rows[5]["labels"] = [-100] + [token if i % 3 else -100 for i, token in enumerate(rows[5]["input_ids"][1:])]
    config = changed(SHORT, max_steps=1, learning_rate=1e-9, gradient_accumulation_steps=2, **layout)
    result = Trainer(model, None, ROWS, config, rows).train()
    # Each document is alone in its row. A token reads what is before it, so the zeros behind the document do not count.
    tokens = np.array([row["input_ids"] + [0] * (64 - len(row["input_ids"])) for row in rows])
    losses = []
    for row, logits in zip(rows, np.asarray(model.logits(jnp.array(tokens)), np.float64), strict=True):
        logits = logits[: len(row["input_ids"])]
        surprise = np.log(np.exp(logits).sum(axis=-1)) - logits[np.arange(len(logits)), np.roll(row["input_ids"], -1)]
        losses += surprise[:-1][np.array(row["labels"])[1:] != -100].tolist()
    assert result.evaluations == {1: pytest.approx(np.mean(losses), rel=1e-5)}


def test_an_evaluation_of_longer_rows_that_does_not_fit_is_refused_before_the_first_step(monkeypatch):
    monkeypatch.setattr("jaxpack.train.run.free_device_bytes", lambda device: 2**40)
    monkeypatch.setattr("jaxpack.train.evaluation.free_device_bytes", lambda device: 1000)
    config = changed(SHORT, packing=False, padding_free=False, max_length=None, max_steps=1)
    trainer = Trainer(small_model("qwen3", lora=LORA), None, ROWS, config, [{"input_ids": [1] * 300}])
    with pytest.raises(InputError, match=r"`eval_dataset` must fit on the device: a batch of 1 x 2 x 384 tokens needs"):
        trainer.train(on_start=lambda: pytest.fail("it has started"))


def test_an_evaluation_that_does_not_fit_ends_the_run_where_it_is_needed(monkeypatch, tmp_path):
    monkeypatch.setattr("jaxpack.train.evaluation.free_device_bytes", lambda device: 1000)
    config = changed(SHORT, max_steps=3, output_dir=str(tmp_path))
    trainer = Trainer(small_model("qwen3", lora=LORA), None, ROWS, config, ROWS[:9])
    with pytest.raises(InputError, match=r"`eval_dataset` must fit on the device: a batch of 1 x 2 x 128 tokens needs"):
        trainer.train()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["3"]


# --- Programs that are compiled while steps run -----------------------------------------------------------------------

ROWS_OF_FOUR_SHAPES = [
    {"input_ids": np.random.default_rng(i).integers(0, 97, 115 + 120 * i).tolist()} for i in range(4)
]
FOUR_SHAPES = changed(
    SHORT, packing=False, padding_free=False, max_length=512, per_device_train_batch_size=1, max_steps=8, seed=0
)
FIRST_USES = [384, 128, 512, 256]  # the row lengths in the order in which the steps need them


def several(eval_dataset: list | None = None, **changes: object) -> Trainer:
    """Returns a trainer of 8 steps with four row lengths."""
    config = changed(FOUR_SHAPES, **changes)
    trainer = Trainer(small_model("qwen3", lora=LORA), None, ROWS_OF_FOUR_SHAPES, config, eval_dataset)
    assert list(dict.fromkeys(trainer.batches.row_lengths.tolist())) == FIRST_USES
    return trainer


def length_of(name: str) -> int:
    return int(name.split()[-2])


@pytest.fixture
def compiled(monkeypatch):
    """Notes the names of programs as they are compiled; calls `before` with each name, and `after_step` after steps."""

    class Hooked:
        def __init__(self, name: str, lowered: jax.stages.Lowered):
            self.name, self.lowered = name, lowered

        def compile(self) -> jax.stages.Compiled:
            compiled.names.append(self.name)
            compiled.before(self.name)
            return self.lowered.compile()

    compiled = SimpleNamespace(names=[], before=lambda name: None, after_step=lambda step: None)
    add = Programs.add
    monkeypatch.setattr(Programs, "add", lambda self, name, lowered: add(self, name, Hooked(name, lowered)))
    log_step = Log.step

    def step(log: Log, metrics: Metrics) -> dict[str, float]:
        measured = log_step(log, metrics)
        compiled.after_step(len(log._done.losses))
        return measured

    monkeypatch.setattr(Log, "step", step)
    return compiled


@functools.cache
def compiled_first() -> TrainResult:
    """Returns the result of a run that compiles all its programs before its first step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "compile", functools.partialmethod(Run.compile, wait_for_all=True))
        return several(ROWS[:9], eval_steps=2).train()


@pytest.mark.parametrize(
    ("is_ample", "order"),
    [(True, [384, 128, 512, 256]), pytest.param(False, [512, 384, 128, 256], marks=pytest.mark.slow)],
)
def test_steps_begin_before_the_programs_of_later_ones_are_compiled_and_compute_the_same(
    is_ample, order, compiled, monkeypatch, capsys
):
    """The programs come in the order of their first use; unless memory is ample, the largest one comes first."""
    monkeypatch.setattr(Run, "_has_room_beside", lambda run, program: is_ample or program is not None)
    first_step, num_early = threading.Event(), 1 if is_ample else 2
    in_time = []

    def wait_for_the_first_step(name: str) -> None:
        if len(compiled.names) > num_early:
            in_time.append(first_step.wait(timeout=60))

    compiled.before, compiled.after_step = wait_for_the_first_step, lambda step: first_step.set()
    threads = threading.active_count()
    result = several(ROWS[:9], eval_steps=2).train()
    assert threading.active_count() == threads
    assert in_time == [True] * (5 - num_early)
    assert [length_of(name) for name in compiled.names if name.startswith("a step of ")] == order
    assert [name.startswith("an evaluation of ") for name in compiled.names] == [False] * 4 + [True]
    assert f"{num_early} of 5 programs are ready after " in capsys.readouterr().err
    want = compiled_first()
    np.testing.assert_array_equal(result.losses, want.losses)
    assert result.evaluations == want.evaluations
    assert result.compiled_shapes == 4


def test_what_needs_a_program_that_is_not_ready_waits_for_it(compiled, monkeypatch, capsys):
    monkeypatch.setattr("jaxpack.train.programs._NOTICED", 0.1)
    compiled.before = lambda name: time.sleep(1) if len(compiled.names) > 1 else None
    result = several(ROWS[:9], eval_steps=2).train()
    told = capsys.readouterr().err
    for name in ("a step of 1 x 1 x 128 tokens", "an evaluation of 1 x 1 x 128 tokens"):
        assert f"waiting until the program for {name} is compiled" in told
    np.testing.assert_array_equal(result.losses, compiled_first().losses)
    assert result.evaluations == compiled_first().evaluations


def test_a_program_that_cannot_be_compiled_ends_the_run_at_the_step_that_needs_it(compiled, tmp_path):
    def fail(name: str) -> None:
        if length_of(name) == 256:
            raise RuntimeError("the compiler failed")

    compiled.before = fail
    trainer = several(output_dir=str(tmp_path))
    with pytest.raises(RuntimeError, match="the compiler failed"):
        trainer.train()
    done = trainer.batches.row_lengths.tolist().index(256)
    assert trainer.steps_in_model == done == 3
    np.testing.assert_array_equal(trainer.progress.losses, compiled_first().losses[:done])


def test_memory_that_runs_out_beside_a_step_is_looked_for_again_without_it(compiled):
    def fail_once(name: str) -> None:
        if length_of(name) == 256 and compiled.names.count(name) == 1:
            raise OUT_OF_MEMORY

    compiled.before = fail_once
    result = several().train()
    assert [length_of(name) for name in compiled.names] == [*FIRST_USES, 256]
    np.testing.assert_array_equal(result.losses, compiled_first().losses)


@pytest.mark.slow
def test_a_program_for_which_there_is_too_little_memory_makes_the_run_take_the_next_choice(compiled, capsys):
    def fail(name: str) -> None:
        if length_of(name) == 256 and compiled.names.count(name) <= 2:
            raise OUT_OF_MEMORY

    compiled.before = fail
    result = several(remat="auto", memory_limit=4.0).train()
    told = capsys.readouterr().err
    assert 'remat "none" does not fit: compiling a step of 1 x 1 x 256 tokens ran out of memory' in told
    assert "the run goes on after step 3; steps to repeat: 0" in told
    assert len(compiled.names) == 4 + 1 + 4
    np.testing.assert_allclose(result.losses, compiled_first().losses, rtol=1e-5)


@pytest.mark.parametrize("times", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_cases_a_step_that_runs_out_of_memory_beside_a_compilation_is_tried_again_without_one(
    times, compiled, monkeypatch, capsys
):
    """The choice of `remat` must not depend on when XLA searches for kernels."""
    second_step, run_step, failures = threading.Event(), Run.step, []

    def step(run: Run, batch: PackedBatch) -> Metrics:
        metrics = run_step(run, batch)
        if run.started == 2 and len(failures) < times:
            second_step.set()
            failures.append(run.remat)
            raise OUT_OF_MEMORY
        return metrics

    compiled.before = lambda name: second_step.wait(timeout=60) if length_of(name) == 512 else None
    monkeypatch.setattr(Run, "step", step)
    result = several(remat="auto", memory_limit=4.0).train()
    told = capsys.readouterr().err
    assert failures == ["none"] * times
    assert told.count('remat "none" does not fit: the device ran out of memory in a step') == times - 1
    assert told.count("ran out of memory in a step while a program was compiled") == 1
    assert "the run goes on after step 1; steps to repeat: 0" in told
    assert [length_of(name) for name in compiled.names[3:]] == times * [512, 128, 256, 384]
    np.testing.assert_allclose(result.losses, compiled_first().losses, rtol=1e-5)


def test_a_run_that_ends_early_begins_no_other_program(compiled):
    may_end = threading.Event()
    compiled.before = lambda name: may_end.wait(timeout=60) if len(compiled.names) == 2 else None

    def stop(step: int) -> None:
        threading.Timer(0.5, may_end.set).start()  # while the run waits for the end of the second compilation
        raise KeyboardInterrupt

    compiled.after_step = stop
    threads = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        several(ROWS[:9]).train()
    assert len(compiled.names) == 2
    assert threading.active_count() == threads


def test_too_little_memory_beside_a_step_lets_all_programs_be_compiled_first(compiled, monkeypatch):
    monkeypatch.setattr(Run, "_has_room_beside", lambda run, program: False)
    compiled.after_step = lambda step: compiled.names.append("a step")
    several(max_steps=4).train()
    assert [name == "a step" for name in compiled.names] == [False] * 4 + [True] * 4


def test_xla_searches_beside_a_step_only_if_there_is_memory_for_both(monkeypatch):
    trainer = several()
    run = Run(trainer.model, trainer.batches, trainer.config)
    run.compile(ProgramCache("none"))
    program = run.program((1, 1, 512))
    found, predicted = {}, {}
    for free in (0, temporary_bytes(program), 10 * temporary_bytes(program), 2**40):
        monkeypatch.setattr("jaxpack.train.run.free_device_bytes", lambda device, free=free: free)
        found[free], predicted[free] = run._has_room_beside(program), run._has_room_beside(None)
    run.close()
    assert list(found.values()) == [False, False, True, True]
    assert not predicted[0]
    assert predicted[2**40]
    run._config = changed(run._config, memory_limit=1e-3)
    assert not run._has_room_beside(None)
