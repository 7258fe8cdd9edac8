"""Runs as `python -m jaxpack.cli.measure REQUEST RESULT`, the process that `jaxpack bench` starts for each case."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch_bridge
from jaxpack.bench.cases import Case
from jaxpack.bench.measure import measure
from jaxpack.bench.models import random_model
from jaxpack.bench.processes import Record, answer
from jaxpack.data.synthetic import read_documents
from jaxpack.errors import InputError, reason
from jaxpack.model.lora import add_lora
from jaxpack.model.nf4 import nf4_store
from jaxpack.model.presets import SHAPES
from jaxpack.model.transformer import Transformer
from jaxpack.model.weights import store_dense
from jaxpack.settings import LoraConfig


def measure_here(request: Path, result: Path, **options: Any) -> None:
    """Answers a request of `bench.measure_elsewhere` in this process; `options` go to `measure`."""

    def figures() -> Record:
        asked = json.loads(request.read_text())
        case = Case(**asked["case"])
        if case.card is not None:
            _take_only(case.card)
        return measure(case, _model(case), read_documents(Path(asked["documents"])), **options)

    answer(result, figures)


def _take_only(gib: float) -> None:
    """Limits the memory that JAX takes to `gib`. Call it before JAX first uses the device."""
    device = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    asked = ["nvidia-smi", "-i", device, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        total = float(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()[0]) / 1024
    except (OSError, subprocess.CalledProcessError, ValueError, IndexError) as error:
        raise InputError(f"`card` must be None without an NVIDIA GPU, got {gib:g}: {reason(error)}.") from error
    if gib > total:
        raise InputError(f"`card` must be at most the {total:.1f} GiB of this device, got {gib:g}.")
    os.environ["XLA_CLIENT_MEM_FRACTION"] = str(gib / total)


def _model(case: Case) -> Transformer:
    experts = ("gate_up_proj", "down_proj") if case.adapts_experts else ()
    lora = None if case.full_finetuning else LoraConfig(r=16, target_parameters=experts)
    if case.model in SHAPES:
        store = nf4_store() if case.load_in_4bit else store_dense
        return random_model(SHAPES[case.model], lora, store=store, lazy=True)
    model, _ = torch_bridge.from_pretrained(case.model, load_in_4bit=case.load_in_4bit, lazy=lora is not None)
    return model if lora is None else add_lora(model, lora)


if __name__ == "__main__":
    measure_here(*map(Path, sys.argv[1:]))
