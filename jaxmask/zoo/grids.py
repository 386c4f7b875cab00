"""Neighbourhood attention in images and videos that are stored row by row, tile by tile, or along a curve."""

import math
import operator
from collections.abc import Sequence
from functools import reduce
from typing import SupportsIndex

import numpy as np

from jaxmask import checks
from jaxmask.mask import Mask
from jaxmask.masks import Prefix, Window
from jaxmask.positions import LIMIT
from jaxmask.zoo.coordinates import Axis, Reordered, both_ways

Sizes = Sequence[SupportsIndex]


def natten(canvas: Sizes, kernel: Sizes) -> Mask:
    """Neighbourhood attention: in an image stored row by row, the ``kernel`` around a token, moved inside at the edges.

    Source: https://arxiv.org/abs/2204.07143; attn-gym's ``generate_natten``, where an even kernel has one token more.
    In several images, or frames, one after the other: ``Chunked(math.prod(canvas)) & natten(canvas, kernel)``.

    Args:
        canvas, kernel: sizes in tokens on each axis, such as ``(height, width)``, at least 1, static.

    >>> print(natten((4,), (3,)).dense(4, 4)[0, 0].astype(int))
    [[1 1 1 0]
     [1 1 1 0]
     [0 1 1 1]
     [0 1 1 1]]
    """
    canvas, kernel = _checked_axes(canvas=canvas, kernel=kernel)
    return _neighbours(canvas, [size // 2 * 2 + 1 for size in kernel])


def tiled_natten(canvas: Sizes, kernel: Sizes, tile: Sizes) -> Mask:
    """Neighbourhood attention in an image stored tile by tile, so that a block of tokens lies in few tiles.

    Source: https://arxiv.org/abs/2403.04690; attn-gym's ``generate_tiled_natten``.

    Args:
        canvas, kernel, tile: sizes in tokens on each axis, such as ``(height, width)``, at least 1, static; whole
            tiles fill the canvas.

    >>> print(tiled_natten((2, 4), (1, 3), tile=(2, 2)).dense(8, 8)[0, 0].astype(int))
    [[1 1 0 0 1 0 0 0]
     [1 1 0 0 1 0 0 0]
     [0 0 1 1 0 0 1 0]
     [0 0 1 1 0 0 1 0]
     [0 1 0 0 1 1 0 0]
     [0 1 0 0 1 1 0 0]
     [0 0 0 1 0 0 1 1]
     [0 0 0 1 0 0 1 1]]
    """
    canvas, kernel, tile = _checked_axes(canvas=canvas, kernel=kernel, tile=tile)
    _check_fills(canvas=canvas, tile=tile)
    split = [size for sides in zip(_divided(canvas, tile), tile, strict=True) for size in sides]
    order = np.arange(math.prod(canvas), dtype=np.int32).reshape(split)
    tiles_first = order.transpose(*range(0, order.ndim, 2), *range(1, order.ndim, 2))
    return Reordered(natten(canvas, kernel), tiles_first.reshape(1, -1))


def morton_natten(canvas: Sizes, kernel: Sizes) -> Mask:
    """Neighbourhood attention in an image stored along a Morton curve, on which a block of tokens is compact.

    Source: attn-gym's ``generate_morton_natten``; https://arxiv.org/abs/2204.07143.

    Args:
        canvas: ``(height, width)`` in tokens: powers of 2, the width as much as the height or twice that, because the
            curve fills no other canvas; static.
        kernel: ``(height, width)`` in tokens, at least 1, static.

    >>> print(morton_natten((2, 4), (1, 3)).dense(8, 8)[0, 0].astype(int))
    [[1 1 0 0 1 0 0 0]
     [1 1 0 0 1 0 0 0]
     [0 0 1 1 0 0 1 0]
     [0 0 1 1 0 0 1 0]
     [0 1 0 0 1 1 0 0]
     [0 1 0 0 1 1 0 0]
     [0 0 0 1 0 0 1 1]
     [0 0 0 1 0 0 1 1]]
    """
    canvas, kernel = _checked_axes(canvas=canvas, kernel=kernel)
    if len(canvas) != 2:
        raise ValueError(f"canvas must be (height, width), got {canvas}")
    # The bits of a position are those of the column and of the row in turn, from the lowest on.
    index = np.arange(math.prod(canvas), dtype=np.int32)
    zero = np.zeros_like(index)
    row, column = (sum(((index >> 2 * bit + odd & 1) << bit for bit in range(16)), start=zero) for odd in (1, 0))
    if row.max() >= canvas[0] or column.max() >= canvas[1]:
        raise ValueError(
            "canvas must be filled by a Morton curve: powers of 2, the width as much as the height or twice that, got "
            f"{canvas}"
        )
    return Reordered(natten(canvas, kernel), (row * canvas[1] + column)[None])


def sta(canvas: Sizes, kernel: Sizes, tile: Sizes, text_seq_len: SupportsIndex = 0) -> Mask:
    """Sliding tile attention: neighbourhood attention of whole tiles, in a video, or an image, stored tile by tile.

    Text may follow, which attends to all and to which all attend. Source: https://arxiv.org/abs/2502.04507;
    attn-gym's ``generate_sta_mask_mod_2d`` and ``_3d``.

    Args:
        canvas, kernel, tile: sizes in tokens on each axis, such as ``(time, height, width)``, at least 1, static; whole
            tiles fill canvas and kernel.
        text_seq_len: number of tokens of text, static.

    >>> print(sta((4,), (2,), (1,), text_seq_len=1).dense(5, 5)[0, 0].astype(int))
    [[1 1 0 0 1]
     [1 1 0 0 1]
     [0 1 1 0 1]
     [0 0 1 1 1]
     [1 1 1 1 1]]
    """
    canvas, kernel, tile = _checked_axes(canvas=canvas, kernel=kernel, tile=tile)
    _check_fills(canvas=canvas, tile=tile)
    _check_fills(kernel=kernel, tile=tile)
    vision = math.prod(canvas)
    length = vision + checks.integer("text_seq_len", text_seq_len, 0, LIMIT)
    near = _neighbours(_divided(canvas, tile), _divided(kernel, tile), stride=math.prod(tile))
    return (near | both_ways(~Prefix(vision))) & Prefix(length)


def _neighbours(canvas: Sequence[int], kernel: Sequence[int], stride: int = 1) -> Mask:
    """Neighbours on every axis of a canvas stored row by row, of elements of ``stride`` tokens."""
    strides = [stride * math.prod(canvas[axis + 1 :]) for axis in range(len(canvas))]
    axes = (Axis(_near(*sizes), sizes[0], step) for *sizes, step in zip(canvas, kernel, strides, strict=True))
    return reduce(operator.and_, axes)


def _near(size: int, kernel: int) -> Mask:
    """On one axis, the ``kernel`` around a coordinate: moved inside, where it would reach over an edge."""
    kernel = min(kernel, size)
    not_before = Window(kernel // 2, None) | ~Prefix(size - kernel)
    not_after = Window(None, (kernel - 1) // 2) | Prefix(kernel)
    return not_before & not_after


def _divided(sizes: Sequence[int], by: Sequence[int]) -> list[int]:
    return [size // divisor for size, divisor in zip(sizes, by, strict=True)]


def _checked_axes(**sizes: Sizes) -> list[tuple[int, ...]]:
    """Sizes of grids as ints: each at least 1, as many as those of the first, which is a grid of all tokens."""
    (first, tokens), *_ = sizes.items()
    checked: list[tuple[int, ...]] = []
    for name, value in sizes.items():
        if not isinstance(value, tuple | list) or not value:
            raise TypeError(f"{name} must be a tuple with a size for each axis, got {checks.describe(value)}")
        if len(value) != len(tokens):
            raise ValueError(f"{name} must have a size for each axis of {first}, got {value!r} for {tokens!r}")
        checked.append(tuple(checks.integer(f"{name}[{axis}]", size, minimum=1) for axis, size in enumerate(value)))
    if math.prod(checked[0]) > LIMIT:
        raise ValueError(f"{first} must hold at most {LIMIT} tokens, got {tokens!r}")
    return checked


def _check_fills(**sizes: Sequence[int]) -> None:
    (name, whole), (part, parts) = sizes.items()
    if any(size % divisor for size, divisor in zip(whole, parts, strict=True)):
        raise ValueError(f"{name} must be filled by whole {part}s, got {tuple(whole)} and {tuple(parts)}")
