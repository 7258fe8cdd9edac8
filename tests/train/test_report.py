"""Tests that a report agrees with the run's files at any stage of the run, and never disturbs the run."""

import json
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from models import small_model

import jaxpack
from jaxpack.errors import InputError, install_command
from jaxpack.planning.cards import card_named
from jaxpack.planning.cost import StepShape, needed_flops
from jaxpack.settings import LoraConfig, TrainConfig
from jaxpack.train import trainer as trainer_module
from jaxpack.train.progress import Log
from jaxpack.train.report import draw_run
from jaxpack.train.step import Metrics
from jaxpack.train.trainer import Trainer

ROWS = [{"input_ids": np.random.default_rng(i).integers(0, 97, 2 + 7 * i % 60).tolist()} for i in range(40)]
PNG = b"\x89PNG\r\n\x1a\n"


def trainer(output: Path, family: str = "qwen3", **changes: object) -> Trainer:
    settings = {"max_length": 64, "packing": True, "per_device_train_batch_size": 2, "max_steps": 7, "eval_steps": 3}
    settings |= {"logging_steps": 2, "save_steps": 0, "learning_rate": 1e-2}
    config = TrainConfig(output_dir=str(output), **settings | changes)
    return Trainer(small_model(family, lora=LoraConfig(r=4, target_modules="q_proj")), None, ROWS, config, ROWS[:9])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("report") / "first"
    trainer(output).train()
    return output


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    """Copies the run's own files without the report."""
    for name in ("metrics.jsonl", "about.json"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    return tmp_path


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def table(text: str) -> dict[str, str]:
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ") and " | " in line]
    return dict(line for line in lines if len(line) == 2)


def test_a_run_ends_with_a_report_of_what_it_did(run: Path) -> None:
    text = (run / "report.md").read_text()
    training = [record for record in records(run) if "loss" in record]
    evaluations = [record for record in records(run) if "eval_loss" in record]
    last, best = training[-1], min(evaluations, key=lambda record: record["eval_loss"])
    assert text.startswith("# first: 7 of 7 steps\n")
    found = table(text)
    assert found["training loss, first and last record"] == f"{training[0]['loss']:.4f}, {last['loss']:.4f} (step 7)"
    assert found["evaluation loss, last"].startswith(f"{evaluations[-1]['eval_loss']:.4f}, perplexity ")
    assert found["evaluation loss, lowest"].startswith(
        f"{best['eval_loss']:.4f}, perplexity {best['eval_perplexity']:.2f} "
    )
    assert found["evaluation loss, lowest"].endswith(f" (step {best['step']})")
    rates = sorted(record["tokens_per_second"] for record in training)
    assert found["tokens per second without padding, median of the records"] == f"{(rates[1] + rates[2]) / 2:,.0f}"
    assert found["peak memory of the device"] == f"{last['peak_memory_bytes'] / 2**30:.2f} GiB"
    start = f"{last['first_step_seconds']:.1f} s, of which compiling took {last['compile_seconds']:.1f} s"
    assert found["time until the first step ended"] == start
    for words in ("- 40 documents, ", "- packing (bfd): ", "- evaluation: 9 documents", "parameters on cpu", "flax 0."):
        assert words in text
    settings = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    assert settings["learning_rate"] == 1e-2
    assert settings["adapters"]["r"] == 4
    assert settings["output_dir"] == str(run)
    assert "](report.png)" in text
    assert (run / "report.png").read_bytes().startswith(PNG)


def test_the_rate_is_told_as_a_share_of_the_cards_published_rate(tmp_path: Path, monkeypatch) -> None:
    assert trainer(tmp_path / "cpu").train().peak_share is None
    assert not [name for name in table((tmp_path / "cpu" / "report.md").read_text()) if "published" in name]
    monkeypatch.setattr(trainer_module, "card_of", lambda kind: card_named("H200"))
    made = trainer(tmp_path / "card")
    result = made.train()
    needed = needed_flops(StepShape.of_run(made.model, made.batches))
    assert result.peak_share == pytest.approx(result.tokens_per_second * needed / 989e12)
    (shown,) = (v for name, v in table((tmp_path / "card" / "report.md").read_text()).items() if "published" in name)
    assert shown == "0%"


def test_the_report_of_a_mixture_says_how_evenly_its_experts_are_used(tmp_path: Path) -> None:
    trainer(tmp_path / "run", "qwen3_moe", router_aux_loss_coef=0.1).train()
    first, *_, last = [record for record in records(tmp_path / "run") if "loss" in record]
    assert 1 < last["busiest_expert"] <= 6
    assert 0 <= last["unused_experts"] < 1
    assert last["router_aux_loss"] >= 1.9  # at least 2, the number of a token's experts, if they are used equally
    lines = table((tmp_path / "run" / "report.md").read_text())
    (busiest,) = (value for name, value in lines.items() if "busiest expert" in name)
    assert busiest == f"{first['busiest_expert']:.2f}, {last['busiest_expert']:.2f} (step {last['step']})"
    (unused,) = (value for name, value in lines.items() if "no token" in name)
    assert unused.startswith(f"{first['unused_experts']:.1%}, ")


def test_a_dense_model_has_no_load_to_balance(run: Path, tmp_path: Path) -> None:
    assert not {"busiest_expert", "unused_experts", "router_aux_loss"} & set(records(run)[0])
    with pytest.raises(InputError, match=r"`router_aux_loss_coef` must be 0 for a model without experts, got 0\.1"):
        trainer(tmp_path / "run", router_aux_loss_coef=0.1).train()


def test_the_padding_is_that_of_the_run(run: Path, tmp_path: Path) -> None:
    expected = trainer(tmp_path / "again").batches.padding_share
    assert table((run / "report.md").read_text())["share of padding among all positions"] == f"{expected:.2%}"


def test_the_picture_draws_the_records(run: Path) -> None:
    found = records(run)
    training = [record for record in found if "loss" in record]
    loss, rate, memory, padding = draw_run(found).axes
    curves = {
        "loss": (loss, 1),
        "tokens_per_second": (rate, 1),
        "peak_memory_bytes": (memory, 2**-30),
        "padding_share": (padding, 100),
    }
    for name, (panel, factor) in curves.items():
        expected = [(record["step"], factor * record[name]) for record in training]
        np.testing.assert_allclose(panel.lines[0].get_xydata(), expected)
        assert panel.get_ylim()[1] > max(value for _, value in expected)
    evaluations = [(record["step"], record["eval_loss"]) for record in found if "eval_loss" in record]
    np.testing.assert_allclose(loss.lines[1].get_xydata(), evaluations)


def test_a_run_that_was_killed_is_reported_up_to_there(copied: Path) -> None:
    lines = (copied / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] <= 4]
    (copied / "metrics.jsonl").write_text("".join(kept) + lines[-1][:20])  # cut in a line
    path = jaxpack.write_report(str(copied))
    assert path == copied / "report.md"
    text = path.read_text()
    last = [json.loads(line) for line in kept if '"loss"' in line][-1]
    assert f"# {copied.name}: 4 of 7 steps\n" in text
    assert table(text)["training loss, first and last record"].endswith(f", {last['loss']:.4f} (step 4)")


def test_a_run_that_is_stopped_has_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Log.step

    def stop(log: Log, metrics: Metrics) -> dict[str, float]:
        measured = step(log, metrics)
        if len(log._done.losses) == 4:
            signal.raise_signal(signal.SIGINT)
        return measured

    monkeypatch.setattr(Log, "step", stop)
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "run").train()
    assert (tmp_path / "run" / "report.md").read_text().startswith("# run: 5 of 7 steps\n")  # step 5 was running


def test_without_matplotlib_the_report_says_how_to_get_the_picture(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = jaxpack.write_report(copied).read_text()
    assert install_command("bench") in text
    assert f"`jaxpack.write_report({str(copied)!r})`" in text
    assert "report.png" not in text
    assert not (copied / "report.png").exists()
    assert "training loss, first and last record" in table(text)


def test_a_loss_that_is_no_cross_entropy_is_reported_without_a_perplexity(copied: Path) -> None:
    kept = [{key: x for key, x in record.items() if key != "eval_perplexity"} for record in records(copied)]
    (copied / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in kept))
    last = [record for record in kept if "eval_loss" in record][-1]
    found = table(jaxpack.write_report(copied).read_text())
    assert found["evaluation loss, last"] == f"{last['eval_loss']:.4f} (step {last['step']})"


def test_one_record_makes_no_picture(copied: Path) -> None:
    line = (copied / "metrics.jsonl").read_text().splitlines()[0]
    (copied / "metrics.jsonl").write_text(line + "\n")
    text = jaxpack.write_report(copied).read_text()
    assert "One record is not enough for a picture" in text
    assert not (copied / "report.png").exists()


def test_what_is_no_number_is_reported_as_that(copied: Path) -> None:
    changed = [record | {name: float("nan") for name in record if "loss" in name} for record in records(copied)]
    (copied / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in changed))
    found = table(jaxpack.write_report(copied).read_text())
    assert found["training loss, first and last record"] == "nan, nan (step 7)"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", None, "`folder` must hold metrics.jsonl, got '{}': No such file or directory."),
        (
            "metrics.jsonl",
            "",
            "`folder` must hold metrics.jsonl with a record of a step, got '{}', whose file has none.",
        ),
        ("about.json", None, "`folder` must hold about.json, got '{}': No such file or directory."),
        (
            "about.json",
            "{}",
            "`folder` must hold the about.json that a run wrote, got '{}', whose file lacks started, after, num_steps,",
        ),
        (
            "about.json",
            '["after"]',
            "`folder` must hold the about.json that a run wrote, got '{}', whose file lacks started, after, ",
        ),
        ("about.json", "{", "`folder` must hold about.json, got '{}': Expecting property name"),
    ],
)
def test_a_folder_of_no_run_is_refused(name: str, content: str | None, message: str, copied: Path) -> None:
    (copied / name).unlink()
    if content is not None:
        (copied / name).write_text(content)
    with pytest.raises(InputError) as refused:
        jaxpack.write_report(copied)
    assert str(refused.value).startswith(message.format(copied))
    assert not (copied / "report.md").exists()


def test_a_report_that_cannot_be_written_does_not_end_the_run(copied: Path, capsys: pytest.CaptureFixture) -> None:
    (copied / "report.md").mkdir()
    trainer(copied, resume_from_checkpoint="latest")._report()
    shown = capsys.readouterr().err
    assert (
        f"the report could not be written: `folder` must be writable, got '{copied}/report.md': Is a directory" in shown
    )


def test_cases_texts_of_a_file_stay_texts_in_a_report(copied: Path) -> None:
    """A folder that somebody else made holds an `about.json` of their own."""
    about = json.loads((copied / "about.json").read_text())
    about |= {"model": "m | x | <script>", "remat": "a | b\n| c | d", "device": "gpu\x1b[31m"}
    about["plan"] = ["one\n# two", "![see](https://example.com/x.png)", "a\x9b2J"]
    (copied / "about.json").write_text(json.dumps(about))
    text = jaxpack.write_report(copied).read_text()
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        *(f"# {copied.name}: 7 of 7 steps", "## Data and model", "## Settings", "## Versions")
    ]
    assert not {*text} & {"\x1b", "\x9b"}
    assert "<script>" not in text
    assert "](https" not in text
    assert table(text)["recomputation in the backward pass"] == r"`remat` a \| b␊\| c \| d"
