"""Tests that transformers 4 computes what we do with the folders that we write. Many servers still have that version.

`make test-transformers4` runs this file twice: with `write FOLDER` in the project's environment, and with `read FOLDER`
in an environment of transformers 4. The first writes a merged model of each family and its logits, the second compares.
"""

import json
import sys
from pathlib import Path

import numpy as np

_ATOL = 1e-4
# transformers 4 derives the attention factor of LongRoPE from the two lengths, and passes over `factor`. Phi-3 has no
# `factor`, but this Llama has. No model on the hub is such a Llama.
_UNLIKE = {"llama_longrope"}


def write(folder: Path) -> None:
    """Writes a merged model of each family, from a random checkpoint and a random adapter, and its logits."""
    import jax
    import jax.numpy as jnp

    import torch_bridge
    from jaxpack import LoraConfig, add_lora
    from jaxpack.model.lora import adapters
    from tests.torch_bridge import hf

    for family in hf.FAMILIES:
        _, path = hf.save_model(folder / family / "base", f"{family}-untied")
        config = json.loads(Path(path, "config.json").read_text())
        config["auto_map"] = {"AutoModelForCausalLM": "modeling_missing.Missing"}  # as Phi-3's folders on the hub
        Path(path, "config.json").write_text(json.dumps(config))
        model, _ = torch_bridge.from_pretrained(path, dtype="float32")
        add_lora(model, LoraConfig(r=4))
        for i, adapter in enumerate(adapters(model).values()):
            adapter.lora_b.set_value(0.02 * jax.random.normal(jax.random.key(i), adapter.lora_b.shape))
        torch_bridge.save_merged(model, folder / family / "merged", dtype="float32")
        tokens = hf.random_tokens(1, 120)
        np.savez(folder / family / "expected.npz", tokens=tokens, logits=model.logits(jnp.asarray(tokens)))


def read(folder: Path) -> None:
    """Compares the logits of transformers with those that `write` wrote; fails on the first family that differs."""
    import torch
    import transformers

    assert transformers.__version__.startswith("4.")
    for path in sorted(folder.iterdir()):
        expected = np.load(path / "expected.npz")
        for trust in (False, True):
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                path / "merged",
                dtype=torch.float32,
                attn_implementation="eager",
                output_loading_info=True,
                trust_remote_code=trust,
            )
            assert not any(info.values()), (path.name, info)
        with torch.no_grad():
            logits = model.eval()(torch.tensor(expected["tokens"], dtype=torch.long)).logits.numpy()
        difference = float(np.abs(logits - expected["logits"]).max())
        print(f"{path.name:16} {difference:.1e}")
        assert (difference <= _ATOL) == (path.name not in _UNLIKE), path.name


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))
