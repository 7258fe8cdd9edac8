"""Tests that `jaxpack bench` writes a table, pictures and results, and refuses bad input in one sentence."""

import json
from pathlib import Path

import pytest


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": "the cab " * (1 + row % 7)}) + "\n" for row in range(30)))
    return path


@pytest.mark.slow
def test_a_users_model_and_data_are_measured_in_every_layout(exit_status, base, data, tmp_path, capfd):
    output = tmp_path / "out"
    flags = ["--plans", "losses", "--documents", "2", "--loss-steps", "2", "--max-length", "64"]
    assert exit_status("bench", "--model", base, "--data", data, "--output", output, *flags) == 0
    records = json.loads((output / "results.json").read_text())["results"]
    assert [record["layout"] for record in records] == ["padded", "padding-free", "packed"]
    for record in records:
        assert record["tokens_per_second"] > 0
        assert len(record["losses"]) == 5
        assert (record["model"], record["data"], record["chosen_remat"]) == (str(base), "30 documents of rows", "full")
    assert {path.name for path in output.iterdir()} == {"results.json", "results_losses.png"}
    out, err = capfd.readouterr()
    assert out.count("losses") == 3
    assert "real tokens/s" in out
    assert err.count(" tokens/s") == 3


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "`data` or `lengths` must be given, and not both, got none."),
        (["--data", "{data}", "--lengths", "{data}"], "`data` or `lengths` must be given, and not both, got both."),
        (["--data", "nowhere.jsonl"], "`data` must be an existing file, got 'nowhere.jsonl'."),
        (["--lengths", "{data}"], "`lengths` must be a CSV file with numbers in the columns"),
        (["--data", "{data}", "--plans", "all"], "`plans` must be among ablation, batch_sizes, losses, got 'all'."),
        (["--data", "{data}", "--sizes", "1,x"], "`sizes` must be whole numbers of at least 1 with commas"),
        (["--data", "{data}", "--documents", "0"], "`documents` must be at least 1, got 0."),
        (["--data", "{data}", "--loss-steps", "0"], "`loss_steps` must be at least 1, got 0."),
        (["--data", "{data}", "--remat", "some"], "`remat` must be one of"),
        (["--data", "{data}", "--learning-rate", "-1"], "`learning_rate` must be a positive number, got -1.0."),
        (["--data", "{data}", "--max-length", "1"], "`max_length` must be at least 2"),
        (["--data", "{data}", "--model", "nothing"], "`model` must be an existing folder"),
        (["--data", "{data}", "--model", "Qwen3-0.6B"], "`tokenizer`"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence_and_nothing_is_written(exit_status, flags, sentence, base, data, tmp_path, capfd):
    output = tmp_path / "out"
    given = [flag.format(data=data) for flag in flags]
    assert exit_status("bench", "--model", base, "--output", output, *given) == 2
    out, err = capfd.readouterr()
    *before, line = err.splitlines()
    assert all(" rows of " in one for one in before)  # the format of the data, which is read first
    assert line.startswith(f"error: {sentence}")
    assert out == ""
    assert not output.exists()
