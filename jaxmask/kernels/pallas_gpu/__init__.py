"""Our own kernel for GPU, which takes any mask."""

from jaxmask.kernels.pallas_gpu.attention import attend, lacks, launches
from jaxmask.kernels.pallas_gpu.blocks import Block, Blocks

__all__ = ["Block", "Blocks", "attend", "lacks", "launches"]
