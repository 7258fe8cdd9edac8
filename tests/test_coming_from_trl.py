"""Tests docs/coming_from_trl.md: names of ours exist, and all defaults that it states are the real ones."""

import ast
import inspect
import re
from typing import Any

import pytest
from foreign_sources import arguments_of, fields_of, folder_of
from readme_blocks import ROOT

import jaxpack
import torch_bridge
from jaxpack.utils.foreign_names import ALIASES, OPPOSITES

PAGE = (ROOT / "docs" / "coming_from_trl.md").read_text()
# The heading of a table, and the class or function whose names need no dot in its third column.
OWNERS = {
    "SFTConfig": "TrainConfig",
    "SFTTrainer": "Trainer",
    "PEFT's LoraConfig": "LoraConfig",
    "Unsloth's FastLanguageModel": "",
}
THEIRS = {
    "SFTConfig": ["transformers/training_args.py", "trl/trainer/base_config.py", "trl/trainer/sft_config.py"],
    "SFTTrainer": ["trl/trainer/sft_trainer.py"],
    "PEFT's LoraConfig": ["peft/config.py", "peft/tuners/lora/config.py"],
}
OLDER = {"warmup_ratio", "group_by_length"}  # names that the installed versions no longer have


def table(heading: str) -> list[list[str]]:
    """Returns the cells of the rows of the table under a heading of the page."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip().strip("`") for cell in row] for row in rows[2:]]


ROWS = [(heading, row) for heading in OWNERS for row in table(heading)]


def default_of(owner: str, name: str) -> Any:
    """Returns the default of an argument or a field; `inspect.Parameter.empty` if it has none."""
    module = jaxpack if hasattr(jaxpack, owner) else torch_bridge
    return inspect.signature(getattr(module, owner)).parameters[name].default


def test_the_page_has_the_sixty_options_that_are_used_most():
    assert len({tuple(row[:1]) for _, row in ROWS}) >= 60
    assert all(len(row) == 5 for _, row in ROWS)


@pytest.mark.parametrize(("heading", "row"), ROWS, ids=lambda x: x[0] if isinstance(x, list) else "")
def test_a_name_of_ours_exists_and_has_the_default_that_is_stated(heading: str, row: list[str]):
    _, _, name, default, _ = row
    if name == "-":
        assert default == ""
        return
    owner, _, name = name.rpartition(".")
    real = default_of(owner or OWNERS[heading], name)
    assert (real is inspect.Parameter.empty) == (default == "")
    if default:
        assert ast.literal_eval(default) == real
        assert type(ast.literal_eval(default)) in (type(real), int)


@pytest.mark.parametrize("heading", THEIRS)
def test_a_default_of_theirs_is_the_real_one(heading: str):
    real: dict[str, Any] = {}
    for path in THEIRS[heading]:
        package, _, rest = path.partition("/")
        source = folder_of(package) / rest
        real |= arguments_of(source, heading) if heading == "SFTTrainer" else fields_of(source)
    for name, default, *_ in table(heading):
        assert (name in real) != (name in OLDER), name
        if default:
            assert ast.literal_eval(default) == real[name], name


def test_the_names_that_the_command_line_reads_are_listed():
    rows = dict(row[:2] for row in table("On the command line"))
    listed = {name: ours for name, ours in ALIASES.items() if name in rows}
    assert rows == listed | {name: f"the opposite of `{ours}" for name, ours in OPPOSITES.items()}


def test_the_differences_name_what_differs():
    """The list above the tables has every setting whose default differs in meaning."""
    (said,) = re.findall(r"## Defaults that differ\n(.*?)\n## ", PAGE, re.DOTALL)
    for name in ("assistant_only_loss", "padding_free", "save_total_limit", "remat", "use_peft", "full_finetuning"):
        assert f"`{name}" in said
    lora = jaxpack.LoraConfig()
    assert f"rank {lora.r}, alpha {lora.lora_alpha} and all linear" in " ".join(said.split())
