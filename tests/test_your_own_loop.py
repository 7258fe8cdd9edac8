"""Tests that the training script of docs/your_own_loop.md runs as it is shown, and that its loss falls."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from models import small_config
from readme_blocks import ROOT
from tokenizers_for_tests import small_tokenizer

import jaxpack
import torch_bridge
from jaxpack import Transformer

PAGE = (ROOT / "docs" / "your_own_loop.md").read_text()
# A small model on a CPU learns in a few short steps if they are large.
SHORTER = {"STEPS = 200": "STEPS = 30", "max_length=4096": "max_length=128", "0.0, 1e-4": "0.0, 1e-2"}


def script() -> str:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    return code


@pytest.fixture
def user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes a reader's folder: a checkpoint, two datasets and a longer file, under the names that the page uses."""
    tokenizer = small_tokenizer()
    model = Transformer(small_config("qwen3", vocab_size=len(tokenizer)), dtype=jnp.float32, rngs=nnx.Rngs(0))
    # The head is the embedding. It is frozen, and as small as it is drawn it cannot be sure of any token.
    model.embedding.set_value(20 * model.embedding[...])
    torch_bridge.save_pretrained(model, str(tmp_path / "path" / "to" / "Qwen3-4B"), tokenizer)
    rows = {
        "questions.jsonl": [{"prompt": "one and one", "completion": " is two"}],
        "prompts.jsonl": [{"prompt": "two and two", "completion": " is four"}, {"prompt": "a", "completion": "b"}],
        "texts.jsonl": [{"text": f"the text number {number}"} for number in range(2000)],
    }
    for name, dataset in rows.items():
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in dataset))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_script_trains_on_a_mixed_stream_and_its_loss_falls(user_folder: Path, capsys: pytest.CaptureFixture):
    code = script()
    for shown, shorter in SHORTER.items():
        assert code.count(shown) == 1
        code = code.replace(shown, shorter)
    names: dict = {}
    exec(code, names)
    losses = [
        float(loss) for loss in re.findall(r"^step \d+: loss ([\d.]+), [\d.]+% padding$", capsys.readouterr().out, re.M)
    ]
    assert len(losses) == 3
    assert losses[-1] < 0.5 * losses[0]
    assert (user_folder / "out" / "adapter" / "adapter_model.safetensors").is_file()
    assert isinstance(names["step"], jax.stages.Compiled)  # one program, which takes every batch or refuses it
    assert names["packer"].padding_share < 0.1


def test_the_script_takes_documents_of_all_sources_by_their_weights(user_folder: Path):
    names: dict = {}
    functions = script().split("model, tokenizer =")[0]
    exec(functions, names)
    sources = [iter(["a"] * 10_000), iter(["b"] * 10_000), iter(["c"] * 200)]
    drawn = list(names["mixed"](sources, [0.5, 0.3, 0.2]))
    assert [drawn.count(name) / len(drawn) for name in "abc"] == pytest.approx([0.5, 0.3, 0.2], abs=0.05)
    assert drawn.count("c") == 200  # the source that ended


def test_the_script_has_about_sixty_lines_of_public_names():
    code = script()
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 60
    assert re.findall(r"^(?:from|import) (jaxpack\S*|torch_bridge\S*)", code, re.M) == ["jaxpack", "torch_bridge"]
    assert set(re.findall(r"\bjaxpack\.(\w+)", code)) <= set(jaxpack.__all__)
