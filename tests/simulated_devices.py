"""Runs Python scripts of the tests in their own processes, on simulated devices."""

import os
import socket
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


# On a busy machine eight devices may wait for each other longer than XLA's 40 seconds.
_PATIENCE = " --xla_cpu_collective_call_terminate_timeout_seconds=600 --xla_cpu_collective_timeout_seconds=600"


def flags_for(count: int) -> str:
    """Returns XLA_FLAGS of a process with `count` simulated devices."""
    return os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={count}" + _PATIENCE


def variables_of_two() -> list[dict[str, str]]:
    """Returns the environments of two processes of one run, which meet at a free port of this machine."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    both = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2"}
    return [both | {"JAX_PROCESS_ID": str(number)} for number in range(2)]


def on_simulated_devices(script: Path, *arguments: str, count: int = 8, **more: str) -> str:
    """Runs a script on `count` simulated devices, and returns the last line that it prints.

    `more` are further variables of its environment.
    """
    environment = (
        os.environ | {"XLA_FLAGS": flags_for(count), "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"} | more
    )
    done = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()[-1]
