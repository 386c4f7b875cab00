"""Eight host devices to shard over, and examples that are the same on every machine."""

import os
from importlib.metadata import version

# Before jax is imported by anything: its backend reads these once.
# Most of the time is compilation. LLVM's optimizations take longer than all that they would speed up here, and so do
# XLA's newer emitters, which later versions cannot go without; `make verify` and the notebooks have both.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else "",
    ]
)
os.environ["JAX_PLATFORMS"] = "cpu"

from collections.abc import Iterator
from typing import Any

import jax
import pytest
from hypothesis import HealthCheck, settings
from jaxtyping import config, install_import_hook

always: dict[str, Any] = {
    "deadline": None,
    "derandomize": True,
    "print_blob": True,
    "suppress_health_check": [HealthCheck.too_slow],
}
settings.register_profile("jaxmask", max_examples=40, **always)
# For `make test-fast` and `make test-latest`.
settings.register_profile("fast", max_examples=5, **always)
settings.load_profile("jaxmask")


def pytest_configure(config: pytest.Config) -> None:
    """Before anything imports the library: its annotations are checked in every call of these tests. An int is a float.

    Not those of torch_compat: PyTorch compiles some of its functions and cannot compile the checks.
    The fast profile goes without, for the checks are a quarter of the time.
    """
    if config.getoption("hypothesis_profile") != "fast":
        install_import_hook("jaxmask", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")


@pytest.fixture(autouse=True)
def annotations_are_checked(request: pytest.FixtureRequest) -> Iterator[None]:
    config.update("jaxtyping_disable", request.node.get_closest_marker("breaks_annotations") is not None)
    yield
    config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True, scope="module")
def forget_compilations() -> Iterator[None]:
    """Programs of one module are of no use to the next, and thousands of them take gigabytes."""
    yield
    jax.clear_caches()
