"""Print what attention to a sequence over many chips receives and takes, as the compiler has it; no TPU is needed.

.venv/bin/python docs/many_chips.py > docs/many_chips.md
"""

import os
import sys

# Before jax is imported: no TPU is here, and libtpu is not to ask for one.
os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

from tests.tpu.many_chips import DIM, HEADS, KV_HEADS, ROWS, line

ABOUT = f"""# A sequence over many chips

`.venv/bin/python docs/many_chips.py > docs/many_chips.md` writes this table; `make test-tpu` checks most of its rows.
They are of `jaxmask.attention` and its gradients, in bfloat16, with {HEADS} heads of queries, {KV_HEADS} of keys, and a
dim of {DIM}. The tokens are divided over all chips. They are compiled ahead of time, for chips that are not there.
Nothing has run: these are figures of the compiler, and no times.

Sizes are in MiB, for each chip. What `explain` says that a chip receives stands beside what the compiled program
receives, by the kind of communication; forward and backward. One query is a step of decoding by a cache whose slots
are divided: the forward pass alone. The imbalance is how much more the busiest chip computes than the mean;
an order of the tokens by `balanced_order` brings that of causal to 1. The last column says how many instructions the
program has: for thousands of chips no more than for a few.

The two agree in all rows.

| chips | | tokens | mask | scheme | said | received | temporaries | imbalance | instructions |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""

if __name__ == "__main__":
    sys.stdout.write(ABOUT)
    for row in ROWS:
        sys.stdout.write(f"{line(row)}\n")
        sys.stdout.flush()
