"""The main job at a real size, through the command line: a checkpoint folder and a JSONL in, an adapter out.

    python benchmarks/bench_main_job.py --lengths LENGTHS.csv --output RESULT.json

Makes a random checkpoint of the model's shape and trains it with `jaxpack train`: packed, padding-free and padded, with
about the same real tokens in a step, each in a process of its own. LENGTHS.csv is a histogram of document lengths with
the columns `token_length_from`, `token_length_to`, `documents`. Prints the last steps of each, then one JSON line.
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
    """Makes the inputs, runs the job in each layout, collects the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="Qwen3-0.6B")
    parser.add_argument("--lengths", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=16_384, help="real tokens in a step, about")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()

    rows = documents(options.lengths, 6_000)
    mean = sum(len(row["input_ids"]) for row in rows) / len(rows)
    rows_of = {"packed": options.tokens // options.max_length, "padding-free": round(options.tokens / mean)}
    rows_of["padded"] = rows_of["padding-free"]
    flags_of = {"packed": "--packing", "padding-free": "--padding-free", "padded": "--no-padding-free"}
    with tempfile.TemporaryDirectory() as folder:
        base, data = Path(folder, "base"), Path(folder, "data.jsonl")
        made = subprocess.run(
            [sys.executable, "-c", _MAKE, options.model, base], check=True, stdout=subprocess.PIPE, text=True
        )
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        result = {
            "benchmark": "main_job",
            "model": options.model,
            "device": made.stdout.strip(),
            "jax": version("jax"),
            "lengths": options.lengths.stem,
            "steps": options.steps,
            "layouts": {},
        }
        for layout, flag in flags_of.items():
            out = Path(folder, layout)
            command = f"""-m jaxpack train --model {base} --data {data} --output {out} {flag}
                --max-length {options.max_length} --per-device-train-batch-size {rows_of[layout]}
                --max-steps {options.steps} --learning-rate 2e-4 --logging-steps 5"""
            subprocess.run([sys.executable, *command.split()], check=True)
            records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            result["layouts"][layout] = {"rows": rows_of[layout], "records": records}
    for layout, measured in result["layouts"].items():
        last = measured["records"][-1]
        print(
            f"{layout:13} {last['tokens_per_second']:>9,.0f} tokens/s  {last['peak_memory_bytes'] / 2**30:6.2f} GiB"
            f"  {last['padding_share']:6.1%} padding  {last['compiled_shapes']} shapes, {last['compile_seconds']:.1f} s"
        )
    line = json.dumps(result)
    if options.output:
        options.output.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
