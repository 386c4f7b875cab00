"""The masks of the literature, made of the vocabulary: one small function each.

The vocabulary already says many of them: causal attention is ``Causal()``, a sliding window ``SlidingWindow(size)``,
chunks ``Causal() & Chunked(size)``, packed documents ``Causal() & Segments(ids)``. The mask classes here, ``Axis``,
``Reordered``, ``Transposed``, ``Blocks`` and ``Between``, say what the vocabulary cannot. The functions combine both.

Masks that are in attn-gym, too (https://github.com/meta-pytorch/attention-gym), agree with its ``mask_mod`` on every
pair. Masks of models in Transformers agree with the model's own function, or with what its layer attends to. A
``TypeError`` or ``ValueError`` names an argument that makes no sense.

>>> from jaxmask import zoo
>>> zoo.streaming_llm(start_size=2, recent_size=64).tiles(4096, 4096).sparsity.round(2)
np.float64(0.91)
"""

from jaxmask.zoo.coordinates import Axis, Reordered, Transposed
from jaxmask.zoo.documents import (
    batchify,
    block_diffusion,
    document,
    jetspec_training,
    jetspec_tree,
    shared_prefix,
    tree_ancestors,
)
from jaxmask.zoo.grids import morton_natten, natten, sta, tiled_natten
from jaxmask.zoo.packing import (
    ordered_groups,
    packed,
    segment_ids_from_cu_seqlens,
    segment_ids_from_lengths,
    segment_ids_from_pad_id,
    segment_ids_from_position_ids,
)
from jaxmask.zoo.tables import Between, Blocks
from jaxmask.zoo.text import (
    bigbird,
    bigbird_random_blocks,
    dilated_sliding_window,
    global_sliding_window,
    longformer,
    prefix_lm,
    ring_positions,
    streaming_llm,
)
from jaxmask.zoo.vision import gemma3, svg_spatial_head, svg_temporal_head, vision_cross_attention, vsa

__all__ = [
    "Axis",
    "Between",
    "Blocks",
    "Reordered",
    "Transposed",
    "batchify",
    "bigbird",
    "bigbird_random_blocks",
    "block_diffusion",
    "dilated_sliding_window",
    "document",
    "gemma3",
    "global_sliding_window",
    "jetspec_training",
    "jetspec_tree",
    "longformer",
    "morton_natten",
    "natten",
    "ordered_groups",
    "packed",
    "prefix_lm",
    "ring_positions",
    "segment_ids_from_cu_seqlens",
    "segment_ids_from_lengths",
    "segment_ids_from_pad_id",
    "segment_ids_from_position_ids",
    "shared_prefix",
    "sta",
    "streaming_llm",
    "svg_spatial_head",
    "svg_temporal_head",
    "tiled_natten",
    "tree_ancestors",
    "vision_cross_attention",
    "vsa",
]
