"""Before jax is imported: no TPU is here, and libtpu is not to ask for one."""

import os

os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"
# It compiles only: another process that has loaded the library is no obstacle.
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
