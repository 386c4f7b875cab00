"""What is installed here, for a report of a fault: ``python -m jaxmask.report``."""

import platform
from importlib.metadata import PackageNotFoundError, version

import jax

PACKAGES = ("jaxmask", "jax", "jaxlib", "flax", "numpy", "jaxtyping", "transformers", "torch", "tokamax")


def report() -> str:
    """A line for each package that is there, and for Python, the platform and the devices. Nothing of them is run.

    >>> report().splitlines()[0].split()[0]
    'jaxmask'
    """
    facts = {name: found for name in PACKAGES if (found := _version(name)) is not None}
    facts["Python"] = f"{platform.python_version()} ({platform.python_implementation()})"
    facts["platform"] = platform.platform()
    facts["backend"] = jax.default_backend()
    kinds = [device.device_kind for device in jax.devices()]
    facts["devices"] = ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))
    return "\n".join(f"{name:<13} {fact}" for name, fact in facts.items())


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    print(report())  # noqa: T201
