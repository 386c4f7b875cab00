"""Block sizes of splash attention: the default, and what a TPU and the kernel accept."""

from jax.experimental.pallas.ops.tpu.splash_attention import BlockSizes
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import NUM_LANES, NUM_SUBLANES

from jaxmask import checks

# What to do with what a length is padded by.
_PADDED = {
    "query_length": "drop the output rows of the padded queries",
    "key_length": "mask the padded keys by & Prefix({length})",
}


def default_blocks(query_length: int, key_length: int) -> BlockSizes:
    """The largest of 512, 256 and 128 that divides each length."""
    sizes: list[int] = []
    for name, length in (("query_length", query_length), ("key_length", key_length)):
        if length % NUM_LANES:
            raise ValueError(
                f"{name} must be a multiple of {NUM_LANES}, because splash attention has no ragged tiles, got "
                f"{length}: pad to {length + -length % NUM_LANES}, and {_PADDED[name].format(length=length)}"
            )
        sizes.append(next(size for size in (512, 256, NUM_LANES) if length % size == 0))
    q, kv = sizes
    return BlockSizes(block_q=q, block_kv=kv, block_q_dkv=q, block_kv_dkv=kv, block_q_dq=q, block_kv_dq=kv)


def check_blocks(sizes: BlockSizes, query_length: int, key_length: int) -> None:
    """Raise where a block is not a multiple of the TPU's unit, or does not divide its length."""
    for name, length, unit, blocks in (
        ("query_length", query_length, NUM_SUBLANES, ("block_q",)),
        ("query_length", query_length, NUM_LANES, ("block_q_dkv", "block_q_dq")),
        ("key_length", key_length, NUM_LANES, ("block_kv", "block_kv_dkv", "block_kv_dq")),
        ("block_kv", sizes.block_kv, NUM_LANES, ("block_kv_compute",)),
        ("block_kv_dkv", sizes.block_kv_dkv or NUM_LANES, NUM_LANES, ("block_kv_dkv_compute",)),
    ):
        for block_name in blocks:
            block = getattr(sizes, block_name)
            if block is None:
                continue  # there is no backward pass, or a fused one
            if checks.integer(f"{block_name} of block_sizes", block, minimum=1) % unit:
                raise ValueError(f"{block_name} of block_sizes must be a multiple of {unit}, got {block}")
            if length % block and name not in _PADDED:
                raise ValueError(f"{name} must be a multiple of {block_name} of block_sizes, got {length} and {block}")
            if length % block:
                raise ValueError(
                    f"{name} must be a multiple of {block_name} of block_sizes, because splash attention has no ragged "
                    f"tiles, got {length} and {block}: pad to {length + -length % block}, and "
                    f"{_PADDED[name].format(length=length)}; or choose another block"
                )
