"""Eight host devices to shard over, and examples that are the same on every machine."""

import os

# Before jax is imported by anything: its backend reads these once.
# LLVM's optimizations take longer than all that they would speed up here; `make verify` and the notebooks have them.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
).strip()
os.environ["JAX_PLATFORMS"] = "cpu"

from collections.abc import Iterator

import jax
import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "jaxmask",
    deadline=None,
    derandomize=True,
    max_examples=60,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("jaxmask")


@pytest.fixture(autouse=True, scope="module")
def forget_compilations() -> Iterator[None]:
    """Programs of one module are of no use to the next, and thousands of them take gigabytes."""
    yield
    jax.clear_caches()
