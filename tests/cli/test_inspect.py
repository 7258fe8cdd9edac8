"""Tests that `jaxpack inspect` prints predictions, draws a picture if asked, and refuses bad input in one sentence."""

import json
import re
import shutil
from pathlib import Path

import pytest


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{row}: ", "completion": "the cab" + " the cab" * (row % 50)} for row in range(90)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_dataset_is_shown_with_its_first_row(exit_status, base, data, tmp_path, capfd):
    before = set(tmp_path.iterdir())
    assert exit_status("inspect", "--model", base, "--data", data, "--max-length", "128", "--batch-size", "4") == 0
    out, _ = capfd.readouterr()
    assert out.startswith("Padding takes ")
    assert out.index("\n\nrow 0: ") < out.index("documents, by length")
    assert re.search(r"^\d+:\[\[( the cab)+", out, re.MULTILINE)
    assert "<- max_length 128" in out
    assert "padding-free *" in out
    assert "\n-> " in out
    assert "\x1b" not in out
    assert "tokens/s" not in out  # there are no rates for a CPU
    assert set(tmp_path.iterdir()) == before


def test_the_run_is_that_of_the_flags_of_train(exit_status, base, data, capfd):
    flags = ["--packing", "--packing-strategy", "bfd_split", "--per-device-train-batch-size", "2", "--show-row", "3"]
    assert exit_status("inspect", "--model", base, "--data", data, "--max-length", "128", "--gpu", "H200", *flags) == 0
    out, _ = capfd.readouterr()
    assert re.search(r"packed \* ┃\n.*\n│ batch .* │ +2 rows of 128 │", out)
    assert "row 3: " in out
    assert "Times for H200 are predicted, not measured." in out


def test_lengths_alone_and_a_picture(exit_status, tmp_path, capfd):
    histogram, picture = tmp_path / "lengths.csv", tmp_path / "drawn.png"
    histogram.write_text("token_length_from,token_length_to,documents\n20,60,500\n60,300,50\n")
    assert (
        exit_status("inspect", "--model", "Qwen3-0.6B", "--lengths", histogram, "--gpu", "H100", "--picture", picture)
        == 0
    )
    out, err = capfd.readouterr()
    assert "row 0" not in out
    assert "tokens/s" in out
    assert "documents         550" in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert f"drew {picture}" in err


def test_the_optimizer_decides_what_fits(exit_status, tmp_path, capfd):
    histogram = tmp_path / "lengths.csv"
    histogram.write_text("token_length_from,token_length_to,documents\n20,60,50\n")
    for optim, fits in (("adamw_torch", False), ("adamw_8bit", True)):
        flags = ["--lengths", histogram, "--gpu", "H200", "--full-finetuning", "--memory-limit", "9", "--optim", optim]
        assert exit_status("inspect", "--model", "Qwen3-0.6B", *flags) == 0
        assert ("The run does not fit" not in capfd.readouterr().out) == fits


def test_weights_in_host_memory_decide_what_fits(exit_status, tmp_path, capfd):
    histogram = tmp_path / "lengths.csv"
    histogram.write_text("token_length_from,token_length_to,documents\n20,60,50\n")
    for setting, fits in (("off", False), ("auto", True)):
        flags = ["--lengths", histogram, "--gpu", "RTX 3060", "--packing", "--offload-weights", setting]
        assert exit_status("inspect", "--model", "Qwen3-8B", *flags) == 0
        said = " ".join(capfd.readouterr().out.split())
        assert ("The run does not fit" not in said) == fits
        wanted = (
            "with the layers' weights in host memory" if fits else '`offload_weights` "auto", it is predicted to fit'
        )
        assert wanted in said


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "`data` or `lengths` must be given, and not both, got none."),
        (["--data", "{data}", "--lengths", "{data}"], "`data` or `lengths` must be given, and not both, got both."),
        (["--data", "nowhere.jsonl"], "`data` must be an existing file, got 'nowhere.jsonl'."),
        (["--data", "{empty}"], "`data` must have at least one row, got none in {empty}."),
        (["--lengths", "{data}"], "`lengths` must be a CSV file with numbers in the columns"),
        (["--data", "{data}", "--model", "nothing"], "`model` must be an existing folder"),
        (
            ["--data", "{data}", "--model", "Qwen3-4B"],
            "`tokenizer` must come with the model for rows without `input_ids`",
        ),
        (["--data", "{data}", "--max-length", "1"], "`max_length` must be at least 2"),
        (
            ["--data", "{data}", "--max-length", "2"],
            "`max_length` must leave at least one document a token to train on",
        ),
        (["--data", "{data}", "--batch-size", "0"], "`batch_size` must be at least 1, got 0."),
        (["--data", "{data}", "--lora-r", "0"], "`lora_r` must be at least 1, got 0."),
        (
            ["--data", "{data}", "--full-finetuning", "--lora-r", "8"],
            "`full_finetuning` must be without flags of adapters, got both. Leave one of them out.",
        ),
        (
            ["--lengths", "{data}", "--show-row", "0"],
            "`show_row` must be without `lengths`, got both: documents drawn from lengths have no text. Use `data`.",
        ),
        (
            ["--lengths", "{data}", "--no-assistant-only-loss"],
            "`assistant_only_loss` must be without `lengths`, got both: documents drawn from lengths have no text.",
        ),
        (["--data", "{data}", "--gpu", "RTX 6000"], "`gpu` must be the name of a known card, got 'RTX 6000'. Did you"),
        (["--data", "{data}", "--gpu", "T4"], "`gpu` must be a card that computes in bfloat16 (Ampere or newer: A10,"),
        (["--data", "{data}", "--show-row", "999"], "`show_row` must be in [0, "),
        (["--data", "{data}", "--picture", "{data}"], "`picture` must end in .png, .svg, .pdf and not exist yet"),
        (["--data", "{data}", "--picture", "nowhere/x.png"], "`picture` must be writable, got 'nowhere/x.png'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence(exit_status, flags, sentence, base, data, tmp_path, capfd):
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    given = [flag.format(data=data, empty=empty) for flag in flags]
    assert exit_status("inspect", "--model", base, *given) == 2
    out, err = capfd.readouterr()
    (line,) = (line for line in err.splitlines() if not re.search(r": [\d,]+ rows? of ", line))
    assert line.startswith(f"error: {sentence.format(empty=empty)}")
    assert line.endswith(".")
    assert out == ""


def test_a_folder_without_a_tokenizer_will_do_for_ids_and_not_for_text(exit_status, base, data, tmp_path, capfd):
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    assert exit_status("inspect", "--model", folder, "--data", data) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert "error: `tokenizer` must come with the model for rows without `input_ids`" in err.splitlines()[-1]
    data.write_text(json.dumps({"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}) + "\n")
    assert exit_status("inspect", "--model", folder, "--data", data, "--max-length", "64") == 0
    assert "5 [[6 7 ]]" in capfd.readouterr().out


def test_every_token_of_messages_is_trained_on_where_that_is_asked(exit_status, base, tmp_path, capfd):
    from chat_templates import CHATML, with_tags

    folder, data = tmp_path / "chat", tmp_path / "messages.jsonl"
    shutil.copytree(base, folder)
    (folder / "chat_template.jinja").write_text(with_tags(CHATML))
    messages = [{"role": "user", "content": "the cab"}, {"role": "assistant", "content": "a cab"}]
    data.write_text(json.dumps({"messages": messages}) + "\n")
    shown = {}
    for flag in ("--assistant-only-loss", "--no-assistant-only-loss"):
        assert exit_status("inspect", "--model", folder, "--data", data, "--batch-size", "1", flag) == 0
        shown[flag] = re.findall(r"\[\[(.*?)\]\]", capfd.readouterr().out, re.DOTALL)[1]
    only, every = shown.values()
    assert "a cab" in only
    assert "the cab" not in only
    assert "the cab" in every


def test_a_typo_is_a_usage_error(exit_status, base, data, capfd):
    assert exit_status("inspect", "--model", base, "--data", data, "--max-lenght", "64") == 2
    out, err = capfd.readouterr()
    assert "--max-lenght" in err
    assert "--max-length" in err
    assert "Traceback" not in err
    assert out == ""
