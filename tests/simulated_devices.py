"""Runs Python scripts of the tests in their own processes, on simulated devices."""

import os
import subprocess
import sys
from pathlib import Path

import jax

TESTS = Path(__file__).parent


def on_simulated_devices(script: Path, *arguments: str, count: int = 8) -> str:
    """Runs a script on `count` simulated devices, and returns the last line that it prints."""
    flags = os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={count}"
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"}
    if jax.__version__.startswith("0.11."):
        # The Shardy partitioner of jax 0.11 crashes on a CPU with frozen weights; jax 0.10 and 0.12 do not.
        environment["JAX_USE_SHARDY_PARTITIONER"] = "false"
    done = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()[-1]
