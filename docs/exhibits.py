"""The masks of the gallery: each a line of code for a length ``n``, and where it comes from."""

from typing import Any, NamedTuple

import numpy as np

import jaxmask
from jaxmask import zoo


class Exhibit(NamedTuple):
    """A mask of the gallery."""

    kind: str
    title: str
    code: str
    source: str
    paper: str = ""

    def mask(self, n: int) -> jaxmask.Mask:
        """The mask, of a sequence of ``n`` tokens."""
        return eval(self.code, {"n": n, **NAMES})


def documents(n: int) -> Any:
    """Four documents, by the id of each token."""
    return np.repeat([[0, 1, 2, 3]], n // 4, axis=1)


def images(n: int) -> Any:
    """Four images in a text, by the id of each token, and -1 for the text."""
    return np.where(np.arange(n) % (n // 4) < n // 8, np.arange(n) // (n // 4), -1)[None]


def first(n: int, count: int) -> Any:
    """Whether a token is one of the first."""
    return np.arange(n)[None] < count


def canvas(n: int) -> tuple[int, int]:
    """The sides of an image of n tokens."""
    return (8, 8) if n == 64 else (64, 128)


def kernel(n: int) -> tuple[int, int]:
    """The sides of a neighbourhood in it."""
    return (3, 3) if n == 64 else (13, 13)


def draft(n: int) -> list[int]:
    """The parent of each token of a tree of n // 4 drafts, two after each; -1 for the first."""
    return [(node - 1) // 2 if node else -1 for node in range(n // 4)]


def triangle(n: int) -> Any:
    """Whether a query attends to a key, for all pairs."""
    return np.tri(n, dtype=bool)


NAMES: dict[str, Any] = {
    **{name: getattr(jaxmask, name) for name in jaxmask.__all__ if name != "to_splash"},
    **{helper.__name__: helper for helper in (documents, images, first, canvas, kernel, draft, triangle)},
    "np": np,
    "zoo": zoo,
}

ARXIV = "https://arxiv.org/abs/"
KINDS = {
    "position": "by position",
    "text": "models of text",
    "document": "documents and drafts",
    "vision": "images and video",
    "own": "your own",
}
EXHIBITS = [
    Exhibit("position", "Everything", "Full()", "BERT", "1810.04805"),
    Exhibit("position", "Nothing", "Empty()", "The neutral element of |"),
    Exhibit("position", "Causal", "Causal()", "Attention is all you need", "1706.03762"),
    Exhibit("position", "Sliding window", "SlidingWindow(n // 8)", "Mistral 7B", "2310.06825"),
    Exhibit("position", "Window to both sides", "Window(n // 16, n // 16)", "ModernBERT", "2412.13663"),
    Exhibit("position", "Chunks", "Causal() & Chunked(n // 4)", "Llama 4; Sparse Transformers", "1904.10509"),
    Exhibit("position", "Prefix", "Prefix(n // 4)", "The keys of a prompt, or of sinks"),
    Exhibit("position", "The future", "~Causal()", "Any mask may be inverted"),
    Exhibit("text", "Left padding", "Causal() & Padding(~first(n, n // 8))", "A batch of prompts"),
    Exhibit(
        "text",
        "Left padding, and chunks that begin after it",
        "Causal() & Chunked(n // 4, n // 8) & ~Prefix(n // 8)",
        "Transformers' chunked_overlay",
    ),
    Exhibit("text", "Prefix language model", "zoo.prefix_lm(n // 4)", "T5", "1910.10683"),
    Exhibit("text", "Attention sinks and a window", "zoo.streaming_llm(4, n // 8)", "StreamingLLM", "2309.17453"),
    Exhibit("text", "Dilated sliding window", "zoo.dilated_sliding_window(n // 8, 2)", "Longformer", "2004.05150"),
    Exhibit(
        "text",
        "A window and global tokens",
        "zoo.global_sliding_window(n // 16, first(n, 2))",
        "Longformer",
        "2004.05150",
    ),
    Exhibit("text", "Longformer", "zoo.longformer(n // 8, first(n, 2), dilation=2)", "Longformer", "2004.05150"),
    Exhibit(
        "text",
        "BigBird",
        "zoo.bigbird(zoo.bigbird_random_blocks(seed=0, heads=1, blocks=16, count=1), n // 16)",
        "BigBird",
        "2007.14062",
    ),
    Exhibit("text", "A head of each kind", "PerHead([Causal(), SlidingWindow(n // 8)])", "DuoAttention", "2410.10819"),
    Exhibit(
        "document", "Packed documents", "Causal() & Segments(documents(n))", "Efficient sequence packing", "2107.02027"
    ),
    Exhibit(
        "document",
        "Packed by lengths",
        "Causal() & zoo.packed(zoo.segment_ids_from_lengths(np.array([[n // 2, n // 4]]), n))",
        "Efficient sequence packing",
        "2107.02027",
    ),
    Exhibit(
        "document",
        "Packed by cumulative lengths",
        "Causal() & zoo.packed(zoo.segment_ids_from_cu_seqlens(np.array([[0, n // 8, n]]), n))",
        "FlashAttention's cu_seqlens",
        "2205.14135",
    ),
    Exhibit(
        "document",
        "Packed by position ids",
        "Causal() & zoo.packed(zoo.segment_ids_from_position_ids(np.arange(n)[None] % (n // 2)))",
        "Transformers' position_ids",
    ),
    Exhibit(
        "document",
        "Padded by a token",
        "Causal() & zoo.packed(zoo.segment_ids_from_pad_id(np.where(first(n, n // 4), 0, 7), 0))",
        "Tokens of which one is for padding",
    ),
    Exhibit(
        "document",
        "Another mask in each document",
        "zoo.document(zoo.prefix_lm(n // 16), documents(n))",
        "Efficient sequence packing",
        "2107.02027",
    ),
    Exhibit(
        "document",
        "Examples of one length in a row",
        "zoo.batchify(zoo.prefix_lm(n // 16), n // 4)",
        "attn-gym's batchify_mask_mod",
    ),
    Exhibit(
        "document",
        "Several answers after one prompt",
        "zoo.shared_prefix(documents(n), np.array([[0, 0, 0, 0]]))",
        "Prefix Grouper",
        "2506.05433",
    ),
    Exhibit(
        "document",
        "A tree of drafts after a prompt",
        "zoo.jetspec_tree(n * 3 // 4, zoo.tree_ancestors(draft(n)))",
        "JetSpec",
        "2606.18394",
    ),
    Exhibit("document", "Training on sampled blocks", "zoo.jetspec_training(n // 4, n // 8)", "JetSpec", "2606.18394"),
    Exhibit("document", "Block diffusion", "zoo.block_diffusion(n // 2, n // 8)", "BD3-LM", "2503.09573"),
    Exhibit("vision", "Images in a text", "zoo.gemma3(images(n))", "Gemma 3", "2503.19786"),
    Exhibit(
        "vision",
        "Text over images",
        "zoo.vision_cross_attention(np.array([[[0, n // 4], [n // 4, n], [n // 2, n], [n // 2, n]]]), n // 4)",
        "Flamingo",
        "2204.14198",
    ),
    Exhibit(
        "vision",
        "Images, state and actions",
        "zoo.ordered_groups(np.arange(n)[None] // (n // 4))",
        "pi0",
        "2410.24164",
    ),
    Exhibit("vision", "Neighbourhood attention", "zoo.natten(canvas(n), kernel(n))", "NATTEN", "2204.07143"),
    Exhibit(
        "vision",
        "Neighbourhoods, tile by tile",
        "zoo.tiled_natten(canvas(n), kernel(n), tile=(4, 4) if n == 64 else (8, 16))",
        "Faster neighborhood attention",
        "2403.04690",
    ),
    Exhibit(
        "vision",
        "Neighbourhoods along a Morton curve",
        "zoo.morton_natten(canvas(n), kernel(n))",
        "NATTEN; attn-gym's generate_morton_natten",
        "2204.07143",
    ),
    Exhibit(
        "vision",
        "Sliding tiles",
        "zoo.sta((n // 16, 4, 4), kernel=(3, 4, 4), tile=(1, 2, 2))",
        "Sliding tile attention",
        "2502.04507",
    ),
    Exhibit(
        "vision",
        "A window of frames",
        "zoo.svg_spatial_head(n // 8, n // 16, 2, round_width=n // 64)",
        "Sparse VideoGen",
        "2502.01776",
    ),
    Exhibit(
        "vision",
        "The same place in all frames",
        "zoo.svg_temporal_head(0, 8, n // 8, 2)",
        "Sparse VideoGen",
        "2502.01776",
    ),
    Exhibit(
        "vision",
        "Chosen tiles",
        "zoo.vsa(np.arange(64).reshape(1, 1, 16, 4) * 7 % 16, n // 16, 16)",
        "Video sparse attention",
        "2505.13389",
    ),
    Exhibit(
        "own",
        "A function of positions",
        "Predicate(lambda b, h, q, kv: (q - kv) % 4 == 0)",
        "FlexAttention",
        "2412.05496",
    ),
    Exhibit("own", "An array of all pairs", "Dense(triangle(n))", "What you have already"),
    Exhibit("own", "A row of a grid", "zoo.Axis(Causal(), size=n // 8)", "Coordinates of positions"),
    Exhibit(
        "own", "Another order", "zoo.Reordered(Causal(), np.arange(n)[None, ::-1])", "Tokens in an order of your own"
    ),
    Exhibit("own", "Queries and keys exchanged", "zoo.Transposed(Prefix(n // 4))", "Any mask may be transposed"),
    Exhibit(
        "own",
        "A table of blocks",
        "zoo.Blocks(np.arange(16).reshape(4, 4) % 3 == 0, size=n // 4)",
        "Sparse Transformers",
        "1904.10509",
    ),
    Exhibit(
        "own",
        "Queries between two, for each key",
        "zoo.Between(np.arange(n)[None], np.minimum(np.arange(n)[None] + n // 4, n))",
        "FlashMask",
        "2410.01359",
    ),
    Exhibit(
        "own",
        "A ring buffer",
        "SlidingWindow(n // 4).at_keys(zoo.ring_positions(n, length=n * 5 // 4))",
        "Mistral 7B",
        "2310.06825",
    ),
]
