"""Tests that a run trains and saves although its log cannot be written."""

import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers_for_tests import write_checkpoint


@pytest.mark.slow
@pytest.mark.parametrize(
    "redirection",
    ["2>/dev/full", pytest.param("2>&-", marks=pytest.mark.slow), pytest.param("2> >(true)", marks=pytest.mark.slow)],
)
def test_a_run_goes_on_where_its_log_cannot_be_written(redirection: str, tmp_path: Path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n' * 20)
    base, output = write_checkpoint(tmp_path / "base"), tmp_path / "run"
    flags = f"--model {base} --data {rows} --output {output} --max-steps 3 --max-length 32 --logging-steps 1 --lora-r 4"
    command = f"{sys.executable} -m jaxpack train {flags} {redirection}"
    done = subprocess.run(["bash", "-c", command], cwd=Path(__file__).parent.parent.parent, timeout=240)
    assert done.returncode == 0
    assert (output / "adapter" / "adapter_model.safetensors").is_file()
    assert len((output / "metrics.jsonl").read_text().splitlines()) >= 3
