"""Print what the compiler makes of the GPU kernel for each kind of mask; no GPU is needed.

.venv-gpu/bin/python docs/gpu_kernels.py > docs/gpu_kernels.md
"""

import sys
from concurrent.futures import ThreadPoolExecutor

from tests.gpu.calls import BATCH, DIMS, HEADS, KERNELS, KV_HEADS, LENGTH, compiled, names
from tests.gpu.target import CARDS, Program

ABOUT = f"""# What the GPU kernel compiles to

`.venv-gpu/bin/python docs/gpu_kernels.py > docs/gpu_kernels.md` writes these tables; `make test-gpu` makes `.venv-gpu`
and checks them. They are of `jaxmask.attention(…, implementation="pallas")` and its gradients, in bfloat16, with
query `[{BATCH}, {LENGTH}, {HEADS}, dim]` and {KV_HEADS} heads of keys. They are compiled ahead of time, for cards that
are not there. Nothing has run: these are figures of the compiler, and no times.

Each figure is of three kernels: forward, dq, and dk with dv. A thread takes registers, and spills bytes of them to
memory. A block takes KiB of shared memory. Beside the three, XLA launches small kernels. One multiplies the output and
its cotangent, and sums over the dim. Where a mask has arrays, others bound its tiles and sort them into lists, by query
and by key.
"""


def row(name: str, program: Program) -> str:
    """A line of a table."""
    of_name = {kernel.name: kernel for kernel in program.kernels}
    kernels = [of_name[name] for name in KERNELS]
    figures = (
        [kernel.registers for kernel in kernels],
        [kernel.spilled for kernel in kernels],
        [round(kernel.shared_memory / 1024) for kernel in kernels],
    )
    cells = [" / ".join(map(str, each)) for each in figures]
    return f"| {' | '.join([name, *cells])} | {len(kernels)} + {len(program.others)} |"


def title(card: str, dim: int) -> str:
    """What stands above a table."""
    return f"## {card}, dim {dim}"


def table(card: str, dim: int) -> str:
    """The table of all calls."""
    head = ["| call | registers | bytes spilled | KiB of shared memory | launched |", "| --- | --- | --- | --- | --- |"]
    with ThreadPoolExecutor(2) as pool:
        programs = pool.map(lambda name: compiled(name, dim, card), names(dim))
        return "\n".join([title(card, dim), "", *head, *map(row, names(dim), programs)])


if __name__ == "__main__":
    sys.stdout.write("\n".join([ABOUT, *(f"{table(card, dim)}\n" for card in CARDS for dim in DIMS)]))
