"""A sequence that is divided over two processes, of four devices each, is attended to as on one device."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from tests.kernels.gloo_laws import CALLS, DEVICES, PROCESSES


def test_two_processes_hold_the_laws_of_one() -> None:
    root = Path(__file__).parents[2]
    # A port that the system gives, and that no other takes in the moment until the first process listens on it.
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = f"--xla_force_host_platform_device_count={DEVICES} --xla_backend_optimization_level=0"
    environment = os.environ | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.kernels.gloo_laws", str(process), str(port)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in range(PROCESSES)
    ]
    try:
        said = [process.communicate(timeout=240)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    for process, text in zip(started, said, strict=True):
        assert process.returncode == 0, text
        assert f"{len(CALLS)} calls hold" in text
