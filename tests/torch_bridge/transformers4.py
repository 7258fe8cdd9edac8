"""Tests that transformers 4 computes what we do with the folders that we write. Many servers still have that version.

`make test-transformers4` runs this file twice: with `write FOLDER` in the project's environment, and with `read FOLDER`
in an environment of transformers 4. The first writes a merged model of each family and its logits, and tokenizers with
and without changes; the second compares.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

_ATOL = 1e-4
# transformers 4 derives the attention factor of LongRoPE from the two lengths, and passes over `factor`. Phi-3 has no
# `factor`, but this Llama has. No model on the hub is such a Llama.
_UNLIKE = {"llama_longrope"}
_SETTINGS = ("eos_token", "pad_token", "bos_token", "padding_side", "model_max_length", "chat_template")


def write(folder: Path) -> None:
    """Writes the folders that `read` reads, each with what is expected of it."""
    write_models(folder / "models")
    write_tokenizers(folder / "tokenizers")


def read(folder: Path) -> None:
    """Fails on the first folder that transformers 4 reads in another way than expected."""
    import transformers

    assert transformers.__version__.startswith("4.")
    read_models(folder / "models")
    read_tokenizers(folder / "tokenizers")


def write_models(folder: Path) -> None:
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


def read_models(folder: Path) -> None:
    """Compares the logits of transformers with those that `write_models` wrote."""
    import torch
    import transformers

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


def write_tokenizers(folder: Path) -> None:
    """Writes each kind of tokenizer with each change, and what transformers 5 reads from the written folder."""
    from transformers import AutoTokenizer

    from tests.tokenizers_for_tests import small_tokenizer
    from tests.torch_bridge.hub_tokenizers import CHANGES, KINDS, ids, write_hub_tokenizer
    from torch_bridge.tokenizer_files import write_tokenizer

    def save(path: Path, tokenizer: Any) -> None:
        (path / "written").mkdir(parents=True)
        write_tokenizer(path / "written", tokenizer)
        again = AutoTokenizer.from_pretrained(path / "written")
        assert ids(again) == ids(tokenizer)
        settings = {name: getattr(again, name) for name in _SETTINGS}
        (path / "expected.json").write_text(json.dumps({"ids": ids(again), "settings": settings}))

    for kind in KINDS:
        for change in ("none", *CHANGES):
            path = folder / f"{kind}, {change}"
            tokenizer = AutoTokenizer.from_pretrained(write_hub_tokenizer(path / "base", kind))
            save(path, tokenizer if change == "none" else CHANGES[change](tokenizer))
    save(folder / "made here", small_tokenizer(bos=True, chat=True, specials=("<new>",)))


def read_tokenizers(folder: Path) -> None:
    """Compares the settings with those in transformers 5, and the ids with those of the base, or of transformers 5.

    The two versions split texts in different ways with the same files of a Llama 2: copies have the base's ids in each.
    """
    import transformers
    from hub_tokenizers import ids

    for path in sorted(folder.iterdir()):
        expected = json.loads((path / "expected.json").read_text())
        tokenizer = transformers.AutoTokenizer.from_pretrained(path / "written", trust_remote_code=True)
        assert {name: getattr(tokenizer, name) for name in _SETTINGS} == expected["settings"], path.name
        base, written = (path / name / "tokenizer.json" for name in ("base", "written"))
        if base.exists() and written.read_bytes() == base.read_bytes():
            expected["ids"] = ids(transformers.AutoTokenizer.from_pretrained(path / "base"))
        assert ids(tokenizer) == expected["ids"], path.name
    print(f"{len(list(folder.iterdir()))} tokenizers")


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))
