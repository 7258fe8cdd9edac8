"""The main job at a real size, through the command line: a checkpoint folder and a JSONL in, an adapter out.

    python benchmarks/bench_main_job.py --lengths LENGTHS.csv --output RESULT.json

Makes a random checkpoint of the model's shape, trains it with `jaxpack train` in a process of its own, and prints one
JSON line with what that process reported.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from cases import MODELS, documents

_MAKE = """
import sys, jax, torch_bridge
from flax import nnx
sys.path.insert(0, "benchmarks")
from cases import MODELS
from jaxpack import Transformer
torch_bridge.save_pretrained(Transformer(MODELS[sys.argv[1]], rngs=nnx.Rngs(0)), sys.argv[2])
print(jax.devices()[0].device_kind)
"""


def main() -> None:
    """Makes the inputs, runs the job, collects its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="Qwen3-0.6B")
    parser.add_argument("--lengths", type=Path, required=True)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        base, data, out = Path(folder, "base"), Path(folder, "data.jsonl"), Path(folder, "out")
        made = subprocess.run(
            [sys.executable, "-c", _MAKE, options.model, base], check=True, stdout=subprocess.PIPE, text=True
        )
        data.write_text("".join(json.dumps(row) + "\n" for row in documents(options.lengths, 6_000)))
        command = f"""-m jaxpack train --model {base} --data {data} --output {out} --packing
            --max-length {options.max_length} --per-device-train-batch-size {options.batch_size}
            --max-steps {options.steps} --learning-rate 2e-4 --logging-steps 5"""
        subprocess.run([sys.executable, *command.split()], check=True)
        result = {
            "benchmark": "main_job",
            "model": options.model,
            "device": made.stdout.strip(),
            "jax": version("jax"),
            "lengths": options.lengths.stem,
            "positions_per_step": options.batch_size * options.max_length,
            "metrics": [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()],
            "adapter_bytes": (out / "adapter" / "adapter_model.safetensors").stat().st_size,
        }
    line = json.dumps(result)
    if options.output:
        options.output.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
