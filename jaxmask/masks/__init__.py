"""The vocabulary: the masks that others are made of.

Each says what it means in ``allows``, for pairs, and again in ``tile_bounds``, for tiles of pairs.
"""

from jaxmask.mask import Empty, Full
from jaxmask.masks.arrays import Dense, Padding, Segments, refuse_other_keys
from jaxmask.masks.composed import PerHead, Predicate
from jaxmask.masks.positional import Causal, Chunked, Prefix, SlidingWindow, Window

__all__ = [
    "Causal",
    "Chunked",
    "Dense",
    "Empty",
    "Full",
    "Padding",
    "PerHead",
    "Predicate",
    "Prefix",
    "Segments",
    "SlidingWindow",
    "Window",
    "refuse_other_keys",
]
