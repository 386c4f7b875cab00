"""Before JAX has a backend: the compiler is to optimize, which the other tests do without."""

import os

os.environ["XLA_FLAGS"] = ""
