"""Attention masks for JAX: described once, read by every backend, never written out needlessly.

>>> import jax.numpy as jnp
>>> mask = Causal() & Padding(jnp.array([[0, 1, 1]]))
>>> mask.dense(3, 3)
Array([[[[False, False, False],
         [False,  True, False],
         [False,  True,  True]]]], dtype=bool)
"""

from typing import TYPE_CHECKING, Any

from jaxmask.attention_fn import make_attention_fn
from jaxmask.bias import unmask_unattended
from jaxmask.dispatch import attention
from jaxmask.draw import plot, show
from jaxmask.explanation import Explanation, explain
from jaxmask.hf.converter import (
    AttentionMaskConverter,
    create_4d_causal_attention_mask,
    expand_mask,
    ignore_causal_mask_sdpa,
    make_causal_mask,
    prepare_4d_attention_mask,
    prepare_4d_attention_mask_for_sdpa,
    prepare_4d_causal_attention_mask,
    prepare_4d_causal_attention_mask_for_sdpa,
)
from jaxmask.mask import Empty, Full, Mask
from jaxmask.masks import (
    Causal,
    Chunked,
    Dense,
    Padding,
    PerHead,
    Predicate,
    Prefix,
    Segments,
    SlidingWindow,
    Window,
)
from jaxmask.merge import merge_attention
from jaxmask.spmd import balanced_order, reorder, restore
from jaxmask.tiles import EMPTY, FULL, PARTIAL, TileMap

if TYPE_CHECKING:
    from jaxmask.kernels.splash import to_splash

__all__ = [
    "EMPTY",
    "FULL",
    "PARTIAL",
    "AttentionMaskConverter",
    "Causal",
    "Chunked",
    "Dense",
    "Empty",
    "Explanation",
    "Full",
    "Mask",
    "Padding",
    "PerHead",
    "Predicate",
    "Prefix",
    "Segments",
    "SlidingWindow",
    "TileMap",
    "Window",
    "attention",
    "balanced_order",
    "create_4d_causal_attention_mask",
    "expand_mask",
    "explain",
    "ignore_causal_mask_sdpa",
    "make_attention_fn",
    "make_causal_mask",
    "merge_attention",
    "plot",
    "prepare_4d_attention_mask",
    "prepare_4d_attention_mask_for_sdpa",
    "prepare_4d_causal_attention_mask",
    "prepare_4d_causal_attention_mask_for_sdpa",
    "reorder",
    "restore",
    "show",
    "to_splash",
    "unmask_unattended",
]


def __getattr__(name: str) -> Any:
    # Pallas takes a while to import, and few need it.
    if name == "to_splash":
        from jaxmask.kernels.splash import to_splash

        return to_splash
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
