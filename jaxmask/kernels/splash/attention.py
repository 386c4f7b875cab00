"""Splash attention, JAX's block-sparse kernel for TPU, with a mask of this library.

Splash must know which tiles to run, and how to decide the pairs of PARTIAL tiles. Both come from the mask: the tiles
from its bounds, and the pairs in the cheapest of four ways that the kernel offers.

Source: ``jax.experimental.pallas.ops.tpu.splash_attention``, whose ``process_mask`` finds the same by reading every
pair.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import BlockSizes, SegmentIds
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import (
    DEFAULT_MASK_VALUE,
    NUM_LANES,
    SplashAttentionKernel,
)
from jaxtyping import Array, Float

from jaxmask import checks, reading
from jaxmask.indices import is_static
from jaxmask.kernels.splash import decide
from jaxmask.kernels.splash.blocks import check_blocks, default_blocks
from jaxmask.kernels.splash.mask_info import TiledMask, mask_info
from jaxmask.mask import Mask, Offset, placed, refuse_no_mask

# The logit of what splash calls a sink. It lies far below the logits of real keys and above DEFAULT_MASK_VALUE: its
# weight is 0 in a row with keys and 1 in a row without, which makes the output of that row 0.
_NO_KEY = -1e30


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("kernel", "segment_ids", "no_key"),
    meta_fields=("shape",),
)
@dataclass(frozen=True, eq=False)
class SplashAttention:
    """Splash attention with its mask, as :func:`to_splash` makes it. A pytree, which may be passed to a ``jit``.

    Args:
        kernel: splash's own, whose arrays have a leading axis ``[batch|1]``.
        segment_ids: int32, of queries ``[batch|1, q]`` and keys ``[batch|1, kv]``; ``None`` where they decide nothing.
        no_key: float32 ``[batch|1]``, the logit that makes a row without keys zero; NaN for an example with more
            PARTIAL tiles than there is room for.
        shape: ``(batch, heads, query_length, key_length)`` of the mask, where a batch or heads of 1 fit any number.
    """

    kernel: SplashAttentionKernel
    segment_ids: SegmentIds | None
    no_key: Float[Array | np.ndarray | jax.ShapeDtypeStruct, "batch"]
    shape: tuple[int, int, int, int]

    def __call__(
        self,
        query: Float[Array, "*batch heads q dim"],
        key: Float[Array, "*batch kv_heads kv dim"],
        value: Float[Array, "*batch kv_heads kv dim_v"],
        *,
        sinks: Float[Array | np.ndarray, "heads"] | None = None,
    ) -> Float[Array, "*batch heads q dim_v"]:
        """Attention, differentiable in all arrays.

        Args:
            query: ``[batch, heads, q, dim]``, scaled already, as a rule by ``dim ** -0.5``; or ``[heads, q, dim]``
                where the mask is the same for every example, as splash's own kernel takes it under a ``vmap``.
            key, value: ``[batch, kv_heads, kv, dim]``, where ``kv_heads`` divides ``heads``; of the rank of the query.
            sinks: a logit for each head, as in :func:`jaxmask.attention`.

        Returns:
            ``[batch, heads, q, dim_v]``. A query with no key to attend to gives zero, and zero gradients.

        Raises:
            ValueError: the shapes do not match each other, or those of the mask.
        """
        batch, heads, query_length, key_length = self.shape
        if query.ndim == 3 and batch == 1:
            return self(query[None], key[None], value[None], sinks=sinks)[0]
        if query.ndim != 4 or batch not in (1, query.shape[0]) or query.shape[2] != query_length:
            examples = "batch" if batch == 1 else batch
            raise ValueError(
                f"query must be [{examples}, heads, {query_length}, dim], as the mask is, got {checks.describe(query)}"
            )
        if heads not in (1, query.shape[1]):
            raise ValueError(f"query must have the {heads} heads that the mask has, got {checks.describe(query)}")
        for name, array in (("key", key), ("value", value)):
            expected = query.shape[0], key_length
            if array.ndim != 4 or (array.shape[0], array.shape[2]) != expected or query.shape[1] % array.shape[1]:
                raise ValueError(
                    f"{name} must be [{expected[0]}, kv_heads, {key_length}, dim], where kv_heads divides "
                    f"{query.shape[1]}, got {checks.describe(array)}"
                )

        def of_example(arrays: Any, query: Array, key: Array, value: Array) -> Any:
            kernel, segment_ids, no_key = arrays
            no_key = jnp.broadcast_to(no_key, query.shape[0])
            # With a sink no row is empty.
            of_heads = no_key if sinks is None else jnp.where(jnp.isnan(no_key), no_key, sinks)
            return kernel(query, key, value, segment_ids, of_heads)

        # Splash takes one example at a time. Arrays that serve every example are not mapped over.
        arrays = self.kernel, self.segment_ids, self.no_key
        axes = jax.tree.map(lambda array: None if array.shape[0] == 1 else 0, arrays)
        arrays = jax.tree.map(lambda array: array[0] if array.shape[0] == 1 else array, arrays)
        return jax.vmap(of_example, in_axes=(axes, 0, 0, 0))(arrays, query, key, value)


def to_splash(
    mask: Mask,
    query_length: int,
    key_length: int,
    *,
    offset: Offset | None = None,
    batch: int | None = None,
    heads: int | None = None,
    block_sizes: BlockSizes | None = None,
    partial_tiles: int | None = None,
    attn_logits_soft_cap: float | None = None,
    interpret: bool = False,
) -> SplashAttention:
    """Splash attention for TPU with a mask, which is never written out as a whole. EMPTY tiles are skipped.

    Splash holds a few bytes for each tile, in 1 MiB of scalar memory. Its grid is as wide as the longest row of tiles
    that may run, as far as that is static. The pairs of a tile are decided by the first of these ways that applies:

    1. Segment ids decide one ``Segments``, and masks with arrays that look at keys alone, where ``&`` joins them to the
       rest: ``Padding``, ``Prefix`` with a length for each example, ``Dense`` of ``[batch, 1, 1, kv]``, and any other
       such mask. This takes ``O(q + kv)`` memory.
    2. The kernel computes a remainder that holds no arrays and is arithmetic on positions. This takes ``O(q)``.
    3. The kernel also computes a remainder that holds int32 numbers, such as a traced window, or a prefix for each
       example under ``|``; at any ``offset``. The numbers travel with the positions: ``O(q)`` for each example.
    4. The PARTIAL tiles of any other remainder are written out, with a byte for each pair, and again for the backward
       pass. Equal tiles of a static remainder (``PerHead``, or a ``Predicate`` that looks at heads or into a table) are
       held once, for all examples. A traced remainder (``Dense``, or ``Segments`` under ``|`` or ``~``) takes room for
       each tile of each example that may turn out to be PARTIAL, or for as many as ``partial_tiles`` says.

    Call it where the arrays are: inside a ``jit``; or inside a ``shard_map`` (with ``check_vma=False``, which splash
    needs) with the lengths of a shard and the offset of its queries. A NumPy array is static, as everywhere: other
    values may cause another compilation.

    Args:
        mask: which pairs may attend. Where tiles differ between examples, examples run one after the other.
        query_length, key_length: static, and multiples of the blocks, because splash has no ragged tiles.
        offset, batch, heads: as in :meth:`Mask.dense`.
        block_sizes: splash's own; by default the largest of 512, 256 and 128 that divides the lengths.
        partial_tiles: for the fourth way alone: how many PARTIAL tiles an example has at most, over all heads. An
            example that has more gives NaN, because no error can be raised where that is known.
        attn_logits_soft_cap: as in splash's own kernel, static.
        interpret: run without a TPU, slowly.

    Raises:
        ValueError: as :meth:`Mask.dense`; a length is not a multiple of its block, or a block not of the TPU's unit.
        TypeError: as :meth:`Mask.dense`; an argument that must be static is traced, or has another type.

    >>> from jaxmask import Causal, Padding
    >>> attention = to_splash(Causal() & Padding(jnp.arange(128)[None] < 100), 128, 128, interpret=True)
    >>> query = key = value = jnp.ones((1, 2, 128, 64))
    >>> attention(query / 8, key, value).shape
    (1, 2, 128, 64)
    """
    if not isinstance(mask, Mask):
        refuse_no_mask(mask, "mask must be a mask")
    query_length = checks.integer("query_length", checks.length("query_length", query_length), minimum=1)
    key_length = checks.integer("key_length", checks.length("key_length", key_length), minimum=1)
    if partial_tiles is not None:
        partial_tiles = checks.integer("partial_tiles", partial_tiles, minimum=1)
    if not isinstance(attn_logits_soft_cap, float | int | None):
        raise TypeError(f"attn_logits_soft_cap must be a Python float, got {checks.describe(attn_logits_soft_cap)}")
    if not isinstance(block_sizes, BlockSizes | None):
        raise TypeError(f"block_sizes must be the BlockSizes of splash attention, got {checks.describe(block_sizes)}")
    blocks = default_blocks(query_length, key_length) if block_sizes is None else block_sizes
    check_blocks(blocks, query_length, key_length)
    batch = None if batch is None else checks.integer("batch", batch, minimum=1)
    heads = None if heads is None else checks.integer("heads", heads, minimum=1)

    mask, at = placed(mask, query_length, key_length, offset, None, None)
    # How many examples and heads the mask tells apart: two queries and keys say as much as all.
    few = replace(at, query_length=2, key_length=2)
    sizes = jax.eval_shape(partial(reading.dense, sizes=(batch, heads)), mask, few).shape[:2]
    segments, of_keys, remainder = decide.divide(mask, sizes)
    traced = decide.trace(remainder, sizes)
    smallest = min(size for size in (blocks.block_q, blocks.block_q_dkv, blocks.block_q_dq, NUM_LANES) if size)
    q_sequence, mask_function = decide.in_kernel(remainder, at, sizes, smallest)
    tiled = TiledMask(
        mask,
        remainder,
        at,
        sizes=sizes,
        remainder_sizes=traced.out_avals[0].shape[:2],
        q_sequence=q_sequence,
        mask_function=mask_function,
        # A predicate may close over an array that is traced, though the mask holds none.
        is_traced=not is_static(remainder) or any(map(checks.is_traced, traced.consts)),
        partial_tiles=partial_tiles,
    )

    forward, overflows = mask_info(tiled, blocks.block_q, blocks.block_kv)
    dq = dkv = None
    if blocks.has_backward_blocks:
        fused = blocks.use_fused_bwd_kernel
        # The fused kernel counts all tiles of a row to find where it writes.
        dkv, dkv_overflows = mask_info(tiled, blocks.block_q_dkv, blocks.block_kv_dkv, by_key=True, shrink=not fused)
        overflows = overflows | dkv_overflows
        if not fused and (blocks.block_q_dq, blocks.block_kv_dq) == (blocks.block_q, blocks.block_kv):
            dq = forward
        elif not fused:
            dq, dq_overflows = mask_info(tiled, blocks.block_q_dq, blocks.block_kv_dq)
            overflows = overflows | dq_overflows
    kernel = SplashAttentionKernel(
        forward,
        dq,
        dkv,
        block_sizes=blocks,
        is_mqa=False,
        save_residuals=False,
        mask_value=DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=attn_logits_soft_cap,
        residual_checkpoint_name=None,
        mask_function=mask_function,
        interpret=interpret,
    )
    return SplashAttention(
        kernel,
        decide.segment_ids(segments, of_keys, at, sizes[0]),
        jnp.where(overflows, jnp.nan, _NO_KEY).astype(jnp.float32),
        (*sizes, query_length, key_length),
    )
