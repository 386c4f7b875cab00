"""Masks of models that see: images amid text, images apart from it, and videos."""

from typing import SupportsIndex

import numpy as np
from jaxtyping import Array, Integer

from jaxmask import checks
from jaxmask.mask import Mask
from jaxmask.masks import Causal, Padding, Prefix, Segments, Window
from jaxmask.positions import LIMIT, Scalar
from jaxmask.zoo.coordinates import Axis, Transposed, both_ways
from jaxmask.zoo.tables import Between, Blocks


def gemma3(
    block_sequence_ids: Integer[Array | np.ndarray, "batch length"], sliding_window: Scalar | None = None
) -> Mask:
    """Text that attends causally, and images within which every token attends to every other.

    Source: Gemma 3, https://arxiv.org/abs/2503.19786, and ``create_masks_for_vision_model`` in Transformers'
    ``modeling_gemma3``. Gemma 4 has this mask in its local layers alone; its global layers are ``Causal()``.

    Args:
        block_sequence_ids: integer ``[batch, length]``: the image to which a token belongs, negative for text.
        sliding_window: number of keys of a local layer, at least 1; an int, or a traced scalar. It cuts images, too:
            a token attends to no key farther back, and to all of its image that follows. ``None`` for a global layer.

    >>> print(gemma3(np.array([[-1, 0, 0, 0, -1]]), sliding_window=2).dense(5, 5)[0, 0].astype(int))
    [[1 0 0 0 0]
     [1 1 1 1 0]
     [0 1 1 1 0]
     [0 0 1 1 0]
     [0 0 0 1 1]]
    """
    checks.fits_int32("block_sequence_ids", checks.array("block_sequence_ids", block_sequence_ids, "i", 2))
    # Whether the query is in an image, not the key: a ring buffer holds keys in another order than these ids.
    mask = Causal() | Segments(block_sequence_ids) & Transposed(Padding(block_sequence_ids >= 0))
    if sliding_window is None:
        return mask
    return mask & Window(checks.scalar("sliding_window", sliding_window, minimum=1) - 1, None)


def vision_cross_attention(
    intervals: Integer[Array | np.ndarray, "batch images 2"], image_token_length: SupportsIndex
) -> Mask:
    """Cross attention from text to images: an interval of the text attends to each image.

    Source: Flamingo, https://arxiv.org/abs/2204.14198; attn-gym's ``generate_vision_cross_attention_mask_mod``. Llama
    3.2 has it, too: ``get_cross_attention_token_mask`` in Transformers' ``processing_mllama`` gives the intervals, with
    -1 for the end of the text. Read it with ``offset=0``, because text and images are of different lengths.

    Args:
        intervals: integer ``[batch, images, 2]``: for each image, the first position of its text and the first after.
        image_token_length: number of tokens in an image, at least 1, static.

    >>> mask = vision_cross_attention(np.array([[[0, 2], [1, 3]]]), image_token_length=2)
    >>> print(mask.dense(3, 4, offset=0)[0, 0].astype(int))
    [[1 1 0 0]
     [1 1 1 1]
     [0 0 1 1]]
    """
    checks.fits_int32("intervals", checks.array("intervals", intervals, "i", 3))
    if intervals.shape[2] != 2:
        raise ValueError(f"intervals must be [batch, images, 2], got {checks.describe(intervals)}")
    tokens = checks.integer("image_token_length", image_token_length, minimum=1)
    checks.integer("image_token_length * images", tokens * intervals.shape[1], 0, LIMIT)
    start, end = (intervals[..., side].repeat(tokens, axis=1) for side in (0, 1))
    return Between(start, end)


def svg_spatial_head(
    prompt_length: SupportsIndex,
    token_per_frame: SupportsIndex,
    width: SupportsIndex,
    attn_sink: bool = False,
    round_width: SupportsIndex = 128,
) -> Mask:
    """A window of ``width`` frames of a video, after a prompt that attends to all and to which all attend.

    Source: Sparse VideoGen, https://arxiv.org/abs/2502.01776; attn-gym's ``generate_spatial_head_mask_mod``.

    Args:
        prompt_length, token_per_frame: numbers of tokens.
        width: number of frames.
        attn_sink: whether all attend to the first frame, too.
        round_width: the window is rounded down to a multiple of it, in tokens.

    >>> print(svg_spatial_head(1, token_per_frame=2, width=1, round_width=1).dense(5, 5)[0, 0].astype(int))
    [[1 1 1 1 1]
     [1 1 1 0 0]
     [1 1 1 1 0]
     [1 0 1 1 1]
     [1 0 0 1 1]]
    """
    prompt_length = checks.integer("prompt_length", prompt_length, 0, LIMIT)
    token_per_frame = checks.integer("token_per_frame", token_per_frame, 1, LIMIT)
    round_width = checks.integer("round_width", round_width, minimum=1)
    near = checks.integer("width", width, minimum=1) * token_per_frame // round_width * round_width
    checks.integer("width * token_per_frame, rounded down to a multiple of round_width,", near, minimum=1)
    prompt, sink = Prefix(prompt_length), Prefix(prompt_length + token_per_frame * bool(attn_sink))
    return sink | Transposed(prompt) | Window(near - 1, near - 1)


def svg_temporal_head(
    prompt_length: SupportsIndex, num_frames: SupportsIndex, token_per_frame: SupportsIndex, width: SupportsIndex
) -> Mask:
    """The same place in all frames of a video, and nearby, after a prompt as in :func:`svg_spatial_head`.

    Source: Sparse VideoGen, https://arxiv.org/abs/2502.01776; attn-gym's ``generate_temporal_head_mask_mod``.

    Args:
        prompt_length, token_per_frame: numbers of tokens.
        num_frames, width: numbers of frames: ``width * token_per_frame // num_frames`` tokens are near.

    >>> print(svg_temporal_head(1, num_frames=2, token_per_frame=2, width=1).dense(5, 5)[0, 0].astype(int))
    [[1 1 1 1 1]
     [1 1 0 1 0]
     [1 0 1 0 1]
     [1 1 0 1 0]
     [1 0 1 0 1]]
    """
    prompt_length = checks.integer("prompt_length", prompt_length, 0, LIMIT)
    num_frames = checks.integer("num_frames", num_frames, minimum=1)
    token_per_frame = checks.integer("token_per_frame", token_per_frame, 1, LIMIT)
    near = checks.integer("width", width, minimum=1) * token_per_frame // num_frames
    checks.integer("width * token_per_frame // num_frames", near, minimum=1)
    frames = Axis(Window(near - 1, near - 1), token_per_frame, start=prompt_length)
    return both_ways(Prefix(prompt_length)) | frames


def vsa(
    topk_indices: Integer[Array | np.ndarray, "batch heads q_tiles top_k"],
    tile_numel: SupportsIndex,
    num_kv_tiles: SupportsIndex,
    variable_block_sizes: Integer[Array | np.ndarray, "#batch kv_tiles"] | None = None,
) -> Mask:
    """Video sparse attention: each tile of queries attends to the tiles of keys that were chosen for it.

    Source: https://arxiv.org/abs/2505.13389; attn-gym's ``generate_vsa_mask_mod``.

    Args:
        topk_indices: integer ``[batch, heads, q_tiles, top_k]``: the tiles chosen.
        tile_numel: number of tokens in a tile, at least 1, static.
        num_kv_tiles: number of tiles of keys, static.
        variable_block_sizes: integer ``[batch, kv_tiles]``: how many tokens of a tile are not padding.

    Raises:
        ValueError: an index or a size, in NumPy, is out of range.

    >>> print(vsa(np.array([[[[1], [0]]]]), tile_numel=2, num_kv_tiles=2).dense(4, 4)[0, 0].astype(int))
    [[0 0 1 1]
     [0 0 1 1]
     [1 1 0 0]
     [1 1 0 0]]
    """
    tile_numel = checks.integer("tile_numel", tile_numel, minimum=1)
    num_kv_tiles = checks.integer("num_kv_tiles", num_kv_tiles, minimum=1)
    checks.in_range("topk_indices", checks.array("topk_indices", topk_indices, "i", 4), 0, num_kv_tiles - 1)
    checks.integer("tile_numel * num_kv_tiles", tile_numel * num_kv_tiles, 1, LIMIT)
    chosen = Blocks((topk_indices[..., None] == np.arange(num_kv_tiles)).any(3), tile_numel)
    if variable_block_sizes is None:
        return chosen
    sizes = checks.array("variable_block_sizes", variable_block_sizes, "i", 2)
    if sizes.shape[1] != num_kv_tiles:
        raise ValueError(
            f"variable_block_sizes must have a size for each of {num_kv_tiles} tiles of keys, got "
            f"{checks.describe(sizes)}"
        )
    checks.in_range("variable_block_sizes", sizes, 0, tile_numel)
    sizes = checks.int32("variable_block_sizes", sizes, 0)
    return chosen & Padding((np.arange(tile_numel) < sizes[..., None]).reshape(sizes.shape[0], -1))
