"""Eight host devices to shard over, and examples that are the same on every machine."""

import os

# Before jax is imported by anything: its backend reads these once.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
os.environ["JAX_PLATFORMS"] = "cpu"

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
