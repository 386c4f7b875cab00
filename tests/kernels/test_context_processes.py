"""A sequence that is divided over two processes, of four devices each, is attended to as on one device."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from tests.kernels.gloo_laws import CALLS, DEVICES, PROCESSES


def test_two_processes_hold_the_laws_of_one() -> None:
    root = Path(__file__).parents[2]
    # A port that the system gives. It is held, so that no other takes it, and shared with the process that listens.
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    held.bind(("127.0.0.1", 0))
    port = held.getsockname()[1]
    # The last of equal flags holds.
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={DEVICES}"
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
        held.close()
        for process in started:
            process.kill()
    for process, text in zip(started, said, strict=True):
        assert process.returncode == 0, text
        assert f"{len(CALLS)} calls hold" in text
