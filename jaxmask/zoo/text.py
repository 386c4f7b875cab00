"""Masks of text models: prefixes, windows, global tokens, random blocks, and the positions in a ring buffer."""

from typing import SupportsIndex

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Integer, Shaped

from jaxmask import checks
from jaxmask.indices import library
from jaxmask.mask import Mask
from jaxmask.masks import Causal, Chunked, Padding, Prefix, SlidingWindow, Window
from jaxmask.positions import LIMIT, Scalar
from jaxmask.zoo.coordinates import Axis, both_ways
from jaxmask.zoo.tables import Blocks


def prefix_lm(prefix_length: Scalar | Integer[Array | np.ndarray, "batch"]) -> Mask:
    """A prefix that all attend to, and causal attention after it.

    Source: T5, https://arxiv.org/abs/1910.10683; attn-gym's ``generate_prefix_lm_mask``. In PaliGemma the prefix is the
    image and the prompt.

    Args:
        prefix_length: number of tokens, at least 0; an int, or a traced int32 ``[]`` or ``[batch]``.

    >>> print(prefix_lm(2).dense(3, 3)[0, 0].astype(int))
    [[1 1 0]
     [1 1 0]
     [1 1 1]]
    """
    return Causal() | Prefix(checks.scalar("prefix_length", prefix_length, minimum=0, ranks=(0, 1)))


def streaming_llm(start_size: Scalar, recent_size: Scalar) -> Mask:
    """Attention sinks and a window: the first ``start_size`` tokens, and the last ``recent_size``, itself included.

    Source: StreamingLLM, https://arxiv.org/abs/2309.17453. Its cache holds only these tokens: say their positions to
    :meth:`Mask.dense` as ``key_positions``. Those of the window are :func:`ring_positions`.

    Args:
        start_size, recent_size: numbers of tokens, at least 0 and 1; ints, or traced scalars.

    >>> print(streaming_llm(1, 2).dense(5, 5)[0, 0].astype(int))
    [[1 0 0 0 0]
     [1 1 0 0 0]
     [1 1 1 0 0]
     [1 0 1 1 0]
     [1 0 0 1 1]]
    """
    sinks = Prefix(checks.scalar("start_size", start_size, minimum=0))
    return Causal() & (sinks | SlidingWindow(checks.scalar("recent_size", recent_size, minimum=1)))


def ring_positions(
    size: SupportsIndex, length: Scalar | Integer[Array | np.ndarray, "batch"]
) -> Int[Array, "size"] | Int[Array, "batch size"]:
    """The ``key_positions`` of a ring buffer of ``size`` slots, into which ``length`` tokens were written in turn.

    Source: the rolling buffer cache of Mistral, https://arxiv.org/abs/2310.06825: token ``i`` is in slot ``i % size``.

    Args:
        size: number of slots, static.
        length: number of tokens so far, the newest included; an int, or a traced int32 ``[]`` or ``[batch]``.

    Returns:
        int32 ``[size]`` or ``[batch, size]``, negative where a slot is still empty.

    >>> ring_positions(4, length=6)
    Array([4, 5, 2, 3], dtype=int32)
    >>> SlidingWindow(3).dense(1, 4, offset=5, key_positions=ring_positions(4, length=6))
    Array([[[[ True,  True, False,  True]]]], dtype=bool)
    """
    slots = np.arange(checks.integer("size", size, minimum=1), dtype=np.int32)
    last = jnp.asarray(checks.scalar("length", length, minimum=0, ranks=(0, 1)), jnp.int32)[..., None] - 1
    return last - (last - slots) % len(slots)


def dilated_sliding_window(window_size: Scalar, dilation: Scalar) -> Mask:
    """Every ``dilation``-th key up to ``window_size`` before and after: ``|q - kv| <= window_size``, a multiple.

    Source: Longformer, https://arxiv.org/abs/2004.05150; attn-gym's ``generate_dilated_sliding_window``.

    Args:
        window_size: number of positions to one side, at least 0; an int, or a traced scalar.
        dilation: the step between keys, 1 to 2**30 - 1; likewise.

    >>> print(dilated_sliding_window(2, 2).dense(4, 4)[0, 0].astype(int))
    [[1 0 1 0]
     [0 1 0 1]
     [1 0 1 0]
     [0 1 0 1]]
    """
    window_size = checks.scalar("window_size", window_size, minimum=0)
    dilation = checks.scalar("dilation", dilation, 1, LIMIT)
    # No further than the last key that is a multiple away: the tiles beyond it are then known to be empty.
    reach = window_size - window_size % dilation
    return Window(reach, reach) & Axis(Chunked(1), size=dilation)


def global_sliding_window(window_size: Scalar, is_global: Shaped[Array | np.ndarray, "batch length"]) -> Mask:
    """A window to both sides, and global tokens: all attend to them, and they to all.

    Source: Longformer, https://arxiv.org/abs/2004.05150; attn-gym's ``generate_global_sliding_window``.

    Args:
        window_size: number of positions to one side, at least 0; an int, or a traced scalar.
        is_global: bool or 0/1 ``[batch, length]``.

    >>> print(global_sliding_window(1, np.array([[1, 0, 0, 0]])).dense(4, 4)[0, 0].astype(int))
    [[1 1 1 1]
     [1 1 1 0]
     [1 1 1 1]
     [1 0 1 1]]
    """
    window_size = checks.scalar("window_size", window_size, minimum=0)
    return Window(window_size, window_size) | both_ways(Padding(checks.array("is_global", is_global, "bi", 2)))


def longformer(
    attention_window: SupportsIndex, is_global: Shaped[Array | np.ndarray, "batch length"], dilation: Scalar = 1
) -> Mask:
    """A window, dilated in the upper layers, and global tokens: all attend to them, and they to all.

    Source: Longformer, https://arxiv.org/abs/2004.05150, and its ``LongformerConfig`` and ``global_attention_mask`` in
    Transformers. For heads of different dilation, combine several of these by :class:`PerHead`.

    Args:
        attention_window: number of keys besides its own, half of them to each side: even, at least 2, static.
        is_global: bool or 0/1 ``[batch, length]``.
        dilation: the step between the keys of the window, 1 to 2**30 - 1; an int, or a traced scalar.

    >>> print(longformer(2, np.array([[1, 0, 0, 0, 0]]), dilation=2).dense(5, 5)[0, 0].astype(int))
    [[1 1 1 1 1]
     [1 1 0 1 0]
     [1 0 1 0 1]
     [1 1 0 1 0]
     [1 0 1 0 1]]
    """
    window = checks.integer("attention_window", attention_window, minimum=2)
    if window % 2:
        raise ValueError(f"attention_window must be even, half of it to each side, got {window}")
    half, dilation = window // 2, checks.scalar("dilation", dilation, 1, LIMIT)
    checks.array("is_global", is_global, "bi", 2)
    # No two positions are further apart than an int32 says, so that a longer reach is no other.
    if isinstance(dilation, int):
        reach = min(half * dilation, checks.INT32_MAX)
    else:
        most = checks.INT32_MAX // half
        xp = library(dilation)
        reach = xp.where(dilation > most, checks.INT32_MAX, half * xp.minimum(dilation, most))
    return dilated_sliding_window(reach, dilation) | both_ways(Padding(is_global))


def bigbird(random_blocks: Integer[Array | np.ndarray, "heads middle_blocks random"], block_size: Scalar) -> Mask:
    """Blocks that attend to their neighbours, to the first, to the last, and to some at random; the ends, to all.

    Source: BigBird, https://arxiv.org/abs/2007.14062, and ``bigbird_block_sparse_attention`` in Transformers, where the
    random blocks are ``rand_attn``.

    Args:
        random_blocks: for each head, the blocks of keys that each block of queries attends to at random; the first and
            the last block of queries have none. As from :func:`bigbird_random_blocks`.
        block_size: number of tokens in a block, at least 1; an int, or a traced scalar.

    >>> random_blocks = np.array([[[3], [5], [1], [2], [3]]])
    >>> print(bigbird(random_blocks, block_size=1).dense(7, 7)[0, 0].astype(int))
    [[1 1 1 1 1 1 1]
     [1 1 1 1 0 0 1]
     [1 1 1 1 0 1 1]
     [1 1 1 1 1 0 1]
     [1 0 1 1 1 1 1]
     [1 0 0 1 1 1 1]
     [1 1 1 1 1 1 1]]
    """
    checks.array("random_blocks", random_blocks, "i", 3)
    block_size = checks.scalar("block_size", block_size, minimum=1)
    if random_blocks.shape[1] == 0:
        raise ValueError(
            "random_blocks must be [heads, blocks - 2, count], for at least one block between the first and the last, "
            f"got {checks.describe(random_blocks)}"
        )
    blocks = random_blocks.shape[1] + 2
    checks.in_range("random_blocks", random_blocks, 0, blocks - 1)
    q, kv = np.indices((blocks, blocks))
    local_or_global = (abs(q - kv) <= 1) | np.isin(q, (0, blocks - 1)) | np.isin(kv, (0, blocks - 1))
    # The first and the last block of queries have no row of their own. They attend to all, whatever row they are given.
    rows = random_blocks[:, np.clip(np.arange(blocks) - 1, 0, blocks - 3)]
    return Blocks((local_or_global | (rows[..., None] == np.arange(blocks)).any(2))[None], block_size)


def bigbird_random_blocks(
    seed: int, heads: SupportsIndex, blocks: SupportsIndex, count: SupportsIndex
) -> Int[np.ndarray, "heads middle_blocks count"]:
    """``count`` blocks of keys at random for each block of queries that has no global attention, for :func:`bigbird`.

    Source: BigBird, https://arxiv.org/abs/2007.14062: they are neither neighbours nor global, and all different.

    Args:
        seed: of NumPy's generator; the same blocks for the same seed.
        heads, blocks: numbers of heads and of blocks in the sequence.
        count: number of random blocks, at most ``blocks - 5``.

    >>> bigbird_random_blocks(seed=0, heads=1, blocks=7, count=2).tolist()
    [[[4, 5], [5, 4], [5, 1], [2, 1], [2, 3]]]
    """
    heads, blocks = checks.integer("heads", heads, minimum=1), checks.integer("blocks", blocks, minimum=3)
    count = checks.integer("count", count, minimum=1)
    if count > blocks - 5:
        raise ValueError(
            f"count must be at most blocks - 5, for neighbours and global blocks are attended to anyway, got {count} "
            f"of {blocks} blocks"
        )
    random = np.random.default_rng(checks.integer("seed", seed, minimum=0))
    middle = np.arange(1, blocks - 1)
    far = [middle[abs(middle - block) > 1] for block in middle]
    return np.array([[random.choice(others, count, replace=False) for others in far] for _ in range(heads)], np.int32)
