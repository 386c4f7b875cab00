"""The chip that the programs of these tests are compiled for."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec


@cache
def v5e() -> NamedSharding:
    """One chip of a TPU v5e; raises where libtpu is missing."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    return NamedSharding(Mesh(np.array(topology.devices[:1]), ("x",)), PartitionSpec())


def spec(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
    """An argument that is there."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=v5e())
