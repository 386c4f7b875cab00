"""The names, signatures, positional order, defaults and results of ``transformers.masking_utils``, on JAX arrays.

Ported code changes one import::

    from jaxmask.hf.masking_utils import create_causal_mask, create_sliding_window_causal_mask

The functions follow Transformers 5.24. Arguments that were called ``past_key_values`` up to 5.23 are called ``cache``
since; the old name is taken, too.

``config`` is any object with the attributes that are read: a configuration of Transformers, a dataclass, a namespace.
A cache is any object that answers ``get_query_offset(layer_idx)`` and ``get_mask_sizes(q_length, layer_idx)``. It may
have lists ``is_sliding``, ``is_linear`` and ``is_dummy``, and a bool ``is_compileable``; what it lacks counts as false.
Its offsets may be traced, as those of a cache of fixed size are inside ``jit``. Another offset never recompiles.

Where ``attention_mask``, ``position_ids`` or an offset is traced, the answer is the one that Transformers gives while
tracing: contents are not looked at, and no mask is left out because of them. ``device`` is accepted and ignored.
"""

from collections.abc import Callable, Mapping
from functools import partial, wraps
from typing import Any, Literal, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Integer, Shaped

from jaxmask import checks
from jaxmask.hf.mask_functions import (
    Mask2D,
    MaskFunction,
    MaskMod,
    add_offsets_to_mask_function,
    and_masks,
    bidirectional_mask_function,
    blockwise_overlay,
    causal_mask_function,
    chunked_causal_mask_function,
    chunked_overlay,
    find_packed_sequence_indices,
    or_masks,
    packed_sequence_compatibility_function,
    packed_sequence_mask_function,
    padding_mask_function,
    remap_positions_for_packed_sequence,
    sliding_window_bidirectional_mask_function,
    sliding_window_bidirectional_overlay,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
    valid_keys,
)
from jaxmask.hf.mask_interfaces import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    MaskRequest,
    eager_mask,
    flash_attention_mask,
    flex_attention_mask,
    maybe_pad_block_sequence_ids,
    prepare_padding_mask,
    sdpa_mask,
)
from jaxmask.tiles import TileMap

__all__ = [
    "ALL_MASK_ATTENTION_FUNCTIONS",
    "LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING",
    "MaskFunction",
    "add_offsets_to_mask_function",
    "and_masks",
    "bidirectional_mask_function",
    "blockwise_overlay",
    "causal_mask_function",
    "chunked_causal_mask_function",
    "chunked_overlay",
    "create_bidirectional_mask",
    "create_bidirectional_sliding_window_mask",
    "create_causal_mask",
    "create_chunked_causal_mask",
    "create_masks_for_generate",
    "create_recurrent_attention_mask",
    "create_sliding_window_causal_mask",
    "eager_mask",
    "find_first_full_attention_index",
    "find_packed_sequence_indices",
    "flash_attention_mask",
    "flex_attention_mask",
    "maybe_pad_block_sequence_ids",
    "or_masks",
    "packed_sequence_compatibility_function",
    "packed_sequence_mask_function",
    "padding_mask_function",
    "prepare_padding_mask",
    "remap_positions_for_packed_sequence",
    "sdpa_mask",
    "sliding_window_bidirectional_mask_function",
    "sliding_window_bidirectional_overlay",
    "sliding_window_causal_mask_function",
    "sliding_window_overlay",
]

Mask4D = Shaped[Array | np.ndarray, "batch heads q keys"]
Embeds = Shaped[Array | np.ndarray, "batch q ..."]
PositionIds = Integer[Array | np.ndarray, "#batch q"]
BlockIds = Integer[Array | np.ndarray, "#batch positions"]
# What an attention implementation takes: bools, an additive mask, the 2D mask itself, or tiles.
Prepared = Shaped[Array | np.ndarray, "..."] | TileMap

Function = TypeVar("Function", bound=Callable[..., Any])


def _takes_past_key_values(create: Function) -> Function:
    """Take ``past_key_values``, which Transformers 5.24 renamed, as ``cache``."""

    @wraps(create)
    def renamed(*args: Any, **kwargs: Any) -> Any:
        if "past_key_values" in kwargs:
            if "cache" in kwargs:
                raise TypeError(f"{create.__name__} got both cache and past_key_values, its old name: give cache alone")
            kwargs["cache"] = kwargs.pop("past_key_values")
        return create(*args, **kwargs)

    return cast(Function, renamed)


def find_first_full_attention_index(cache: Any) -> int:
    """The index of the first layer of a cache that is neither sliding nor linear nor a dummy, or else 0.

    >>> from types import SimpleNamespace
    >>> find_first_full_attention_index(SimpleNamespace(is_sliding=[True, True, False]))
    2
    """
    sliding = getattr(cache, "is_sliding", [])
    others = [getattr(cache, name, [False] * len(sliding)) for name in ("is_linear", "is_dummy")]
    return next((index for index, kinds in enumerate(zip(sliding, *others, strict=True)) if not any(kinds)), 0)


@_takes_past_key_values
def create_causal_mask(
    config: Any,
    inputs_embeds: Embeds,
    attention_mask: Mask2D | Mask4D | TileMap | None,
    cache: Any,
    position_ids: PositionIds | None = None,
    or_mask_function: MaskMod | None = None,
    and_mask_function: MaskMod | None = None,
    block_sequence_ids: BlockIds | None = None,
    layer_idx: int | None = None,
    allow_is_causal_skip: bool = True,
) -> Prepared | None:
    """The causal mask of a model's inputs, in the form that its attention implementation takes.

    Args:
        config: read for ``_attn_implementation`` and for ``is_causal``. Where that is false, the mask is the one of
            :func:`create_bidirectional_mask`.
        inputs_embeds: ``[batch, q, ...]``, read for its shape and its floating dtype.
        attention_mask: 0/1 ``[batch, keys]``, the cached ones included; or ``None``. An array of four dimensions or a
            ``TileMap`` is handed back as it is.
        cache: a cache, or ``None``. A ``PagedAttentionCache`` of Transformers needs no mask.
        position_ids: integer ``[batch, q]`` or ``[1, q]``. Where there is neither a mask nor a cache, it tells which
            sequences are packed into a row, as :func:`find_packed_sequence_indices` finds them. Tokens of one sequence
            do not attend to those of another, whatever the other arguments allow.
        or_mask_function, and_mask_function: functions of (batch, head, query, key) that allow more, or less.
        block_sequence_ids: integer ``[batch, keys]`` or ``[1, keys]``. Tokens with the same id attend to each other in
            both directions. A negative id means that a token is in no block.
        layer_idx: the layer of the cache to ask for sizes; the first with full attention where it is ``None``.
        allow_is_causal_skip: whether the answer may be ``None`` where ``is_causal`` of the kernel means the same mask.

    Returns:
        bool ``[batch, 1, q, kv]`` for ``"sdpa"``, an additive mask of that shape for ``"eager"``, the 2D mask for flash
        attention, a ``TileMap`` for ``"flex_attention"``, or what a function that was put in
        ``ALL_MASK_ATTENTION_FUNCTIONS`` returns. ``None`` where the kernel needs no mask. Source:
        ``create_causal_mask`` in Transformers' ``masking_utils``.

    Raises:
        AttributeError: ``config`` has no ``_attn_implementation``.
        TypeError: an array is not a JAX or NumPy array (a torch tensor, say); a mask function is not a function.
        ValueError: arrays have another rank, or are for different batches.

    >>> from types import SimpleNamespace
    >>> config = SimpleNamespace(_attn_implementation="sdpa")
    >>> create_causal_mask(config, jnp.zeros((1, 2, 8)), jnp.array([[0, 1]]), None)
    Array([[[[False, False],
             [False,  True]]]], dtype=bool)
    """
    return _create_mask("full", True, **locals())


@_takes_past_key_values
def create_bidirectional_mask(
    config: Any,
    inputs_embeds: Embeds,
    attention_mask: Mask2D | Mask4D | TileMap | None,
    encoder_hidden_states: Shaped[Array | np.ndarray, "batch kv ..."] | None = None,
    cache: Any = None,
    or_mask_function: MaskMod | None = None,
    and_mask_function: MaskMod | None = None,
    allow_is_bidirectional_skip: bool = True,
    **kwargs: object,
) -> Prepared | None:
    """The mask of an encoder, or of cross-attention: every key that is not padding.

    Args:
        encoder_hidden_states: ``[batch, kv, ...]``, read in place of ``inputs_embeds`` for its dtype, its batch and,
            without a mask, the number of keys.
        allow_is_bidirectional_skip: whether the answer may be ``None`` where nothing is masked.
        kwargs: accepted and ignored.

    The other arguments, the result and the errors are those of :func:`create_causal_mask`. Source:
    ``create_bidirectional_mask`` in Transformers' ``masking_utils``.

    >>> from types import SimpleNamespace
    >>> config = SimpleNamespace(_attn_implementation="eager")
    >>> create_bidirectional_mask(config, jnp.zeros((1, 1, 8), jnp.float16), jnp.array([[1, 0]]))
    Array([[[[ 0.00e+00, -6.55e+04]]]], dtype=float16)
    """
    return _create_mask("full", False, **locals())


@_takes_past_key_values
def create_sliding_window_causal_mask(
    config: Any,
    inputs_embeds: Embeds,
    attention_mask: Mask2D | Mask4D | TileMap | None,
    cache: Any,
    position_ids: PositionIds | None = None,
    or_mask_function: MaskMod | None = None,
    and_mask_function: MaskMod | None = None,
    block_sequence_ids: BlockIds | None = None,
    layer_idx: int | None = None,
    allow_is_causal_skip: bool = True,
) -> Prepared | None:
    """The causal mask of the last ``config.sliding_window`` keys, the query's own included.

    Arguments, result and errors are those of :func:`create_causal_mask`; the sizes are those of the cache's first
    sliding layer. It is a ``ValueError`` if ``config`` has no ``sliding_window``. Source:
    ``create_sliding_window_causal_mask`` in Transformers' ``masking_utils``.

    >>> from types import SimpleNamespace
    >>> config = SimpleNamespace(_attn_implementation="sdpa", sliding_window=2)
    >>> create_sliding_window_causal_mask(config, jnp.zeros((1, 3, 8)), None, None)
    Array([[[[ True, False, False],
             [ True,  True, False],
             [False,  True,  True]]]], dtype=bool)
    """
    return _create_mask("sliding", True, **locals())


@_takes_past_key_values
def create_bidirectional_sliding_window_mask(
    config: Any,
    inputs_embeds: Embeds,
    attention_mask: Mask2D | Mask4D | TileMap | None,
    encoder_hidden_states: Shaped[Array | np.ndarray, "batch kv ..."] | None = None,
    cache: Any = None,
    or_mask_function: MaskMod | None = None,
    and_mask_function: MaskMod | None = None,
    allow_is_bidirectional_skip: bool = True,
    **kwargs: object,
) -> Prepared | None:
    """The mask of an encoder whose tokens attend to ``config.sliding_window`` keys before them and after them.

    Arguments, result and errors are those of :func:`create_bidirectional_mask`. It is a ``ValueError`` if ``config``
    has no ``sliding_window``. Source: ``create_bidirectional_sliding_window_mask`` in Transformers' ``masking_utils``.

    >>> from types import SimpleNamespace
    >>> config = SimpleNamespace(_attn_implementation="sdpa", sliding_window=1)
    >>> create_bidirectional_sliding_window_mask(config, jnp.zeros((1, 3, 8)), None)
    Array([[[[ True,  True, False],
             [ True,  True,  True],
             [False,  True,  True]]]], dtype=bool)
    """
    return _create_mask("sliding", False, **locals())


@_takes_past_key_values
def create_chunked_causal_mask(
    config: Any,
    inputs_embeds: Embeds,
    attention_mask: Mask2D | Mask4D | TileMap | None,
    cache: Any,
    position_ids: PositionIds | None = None,
    or_mask_function: MaskMod | None = None,
    and_mask_function: MaskMod | None = None,
    block_sequence_ids: BlockIds | None = None,
    layer_idx: int | None = None,
    allow_is_causal_skip: bool = True,
) -> Prepared | None:
    """The causal mask within chunks of ``config.attention_chunk_size``. The first begins after padding on the left.

    Arguments, result and errors are those of :func:`create_causal_mask`. It is a ``ValueError`` if ``config`` has no
    ``attention_chunk_size``, or if it asks for flash attention and there are more keys than that. Source:
    ``create_chunked_causal_mask`` in Transformers' ``masking_utils``.

    >>> from types import SimpleNamespace
    >>> config = SimpleNamespace(_attn_implementation="sdpa", attention_chunk_size=2)
    >>> create_chunked_causal_mask(config, jnp.zeros((1, 3, 8)), jnp.array([[0, 1, 1]]), None)
    Array([[[[False, False, False],
             [False,  True, False],
             [False,  True,  True]]]], dtype=bool)
    """
    return _create_mask("chunked", True, **locals())


def _create_mask(
    kind: Literal["full", "sliding", "chunked"],
    is_causal: bool,
    config: Any,
    inputs_embeds: Any,
    attention_mask: Any,
    cache: Any,
    or_mask_function: MaskMod | None,
    and_mask_function: MaskMod | None,
    position_ids: Any = None,
    block_sequence_ids: Any = None,
    encoder_hidden_states: Any = None,
    layer_idx: int | None = None,
    allow_is_causal_skip: bool = False,
    allow_is_bidirectional_skip: bool = False,
    kwargs: object = None,
) -> Any:
    """The five functions above, whose arguments are those that come after ``is_causal``."""
    if is_causal and kind != "chunked" and not getattr(config, "is_causal", True):
        is_causal, position_ids, block_sequence_ids, layer_idx = False, None, None, None
        allow_is_causal_skip, allow_is_bidirectional_skip = False, allow_is_causal_skip
    if attention_mask is not None and not isinstance(attention_mask, TileMap):
        checks.array("attention_mask", attention_mask, "bif", 2, 4)
    if isinstance(attention_mask, TileMap) or (attention_mask is not None and attention_mask.ndim == 4):
        return attention_mask
    # By name, for jaxmask never imports Transformers.
    if any(base.__name__ == "PagedAttentionCache" for base in type(cache).__mro__):
        return None
    if not hasattr(config, "_attn_implementation"):
        raise AttributeError(
            f"config, {checks.describe(config)}, must have _attn_implementation, such as 'sdpa' or 'eager'"
        )
    interface = ALL_MASK_ATTENTION_FUNCTIONS.get(config._attn_implementation)
    if interface is None:
        return None

    q_length = checks.array("inputs_embeds", inputs_embeds, "bif", 2, 3, 4).shape[1]
    embeds = inputs_embeds
    if encoder_hidden_states is not None:
        embeds = checks.array("encoder_hidden_states", encoder_hidden_states, "bif", 2, 3, 4)
    batch_size = embeds.shape[0]
    if attention_mask is not None:
        attention_mask = valid_keys("attention_mask", attention_mask)
    if cache is not None:
        if layer_idx is None:
            layer_idx = find_first_full_attention_index(cache) if kind == "full" else _first_sliding_index(cache)
        q_offset = cache.get_query_offset(layer_idx)
        kv_length, kv_offset = cache.get_mask_sizes(q_length, layer_idx)
    else:
        q_offset, kv_offset = 0, 0
        keys = embeds if attention_mask is None else attention_mask
        kv_length = keys.shape[1]
    request = MaskRequest.of(batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask)

    function, local_size = _mask_function(kind, is_causal, config, request)
    plain = function
    if or_mask_function is not None:
        function = or_masks(function, or_mask_function)
    if and_mask_function is not None:
        function = and_masks(function, and_mask_function)
    packed = None
    if position_ids is not None and attention_mask is None and cache is None:
        _check_ids("position_ids", position_ids, batch_size, q_length)
        packed = find_packed_sequence_indices(position_ids)
        if packed is not None:
            function = remap_positions_for_packed_sequence(function, position_ids)
    if block_sequence_ids is not None:
        _check_ids("block_sequence_ids", block_sequence_ids, batch_size)
        function = or_masks(function, blockwise_overlay(_reaching_every_key(block_sequence_ids, request)))
    if packed is not None:
        function = and_masks(function, packed_sequence_mask_function(packed))
    # A cache that compiles keeps one shape of answer from one query to the next.
    decodes = q_length == 1 and getattr(cache, "is_compileable", False)
    return interface(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=request.kv_length,
        q_offset=request.q_offset,
        kv_offset=request.kv_offset,
        mask_function=function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip and function is plain and not decodes,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip and function is plain,
        dtype=embeds.dtype,
        config=config,
        use_vmap=or_mask_function is not None or and_mask_function is not None,
    )


def _first_sliding_index(cache: Any) -> int:
    return next((index for index, is_sliding in enumerate(getattr(cache, "is_sliding", [])) if is_sliding), 0)


def _mask_function(kind: str, is_causal: bool, config: Any, request: MaskRequest) -> tuple[MaskFunction, int | None]:
    """The mask function of a kind of layer, and the size of its window or chunk."""
    if kind == "full":
        return (causal_mask_function if is_causal else bidirectional_mask_function), None
    if kind == "sliding":
        window = _size(config, "sliding_window")
        windowed = sliding_window_causal_mask_function if is_causal else sliding_window_bidirectional_mask_function
        return windowed(window), window
    chunk_size = _size(config, "attention_chunk_size")
    if "flash" in config._attn_implementation and not checks.is_array(request.kv_offset):
        keys = request.kv_length + request.kv_offset
        if keys > chunk_size:
            raise ValueError(
                f"flash attention has no chunks, and {keys} keys are more than the one chunk of attention_chunk_size="
                f"{chunk_size}: use another _attn_implementation than {config._attn_implementation!r}"
            )
    left_padding = 0
    if request.attention_mask is not None:
        is_numpy = isinstance(request.attention_mask, np.ndarray)
        left_padding = (_left_padding if is_numpy else jax.jit(_left_padding))(request.attention_mask)
    return chunked_causal_mask_function(chunk_size, left_padding), chunk_size


def _left_padding(valid: Any) -> Any:
    """The number of keys before the first valid one, for each example."""
    return (valid.cumsum(axis=1) == 0).sum(axis=1)


def _size(config: Any, name: str) -> int:
    size = getattr(config, name, None)
    if size is None:
        raise ValueError(f"config, {checks.describe(config)}, must have {name}, which is missing or None")
    return checks.integer(f"{name} of config", size, minimum=1)


def _check_ids(name: str, ids: Any, batch_size: int, length: int | None = None) -> None:
    checks.array(name, ids, "i", 2)
    if ids.shape[0] not in (1, batch_size) or length not in (None, ids.shape[1]):
        expected = f"[{batch_size}, {'keys' if length is None else length}]"
        raise ValueError(
            f"{name} must have the shape {expected}, or 1 in place of {batch_size}, got {checks.describe(ids)}"
        )


def _reaching_every_key(block_sequence_ids: Any, request: MaskRequest) -> Any:
    """The ids, with -1 for later keys. Their number depends on no offset, so that another one never recompiles."""
    missing = 0 if checks.is_traced(request.kv_offset) else int(request.kv_offset) - block_sequence_ids.shape[1]
    added = request.kv_length + max(missing, 0)
    return jnp.pad(block_sequence_ids, ((0, 0), (0, added)), constant_values=-1)


@_takes_past_key_values
def create_recurrent_attention_mask(
    config: Any,
    inputs_embeds: Embeds,
    attention_mask: Mask2D | Mask4D | None,
    cache: Any = None,
    **kwargs: object,
) -> Shaped[Array, "batch q"] | None:
    """The 2D mask of the new tokens, by which layers of linear attention multiply their inputs.

    Args:
        inputs_embeds: ``[batch, q, ...]``, read for its shape.
        attention_mask: 0/1 ``[batch, keys]``. The last ``q`` keys are the new tokens.
        config, cache, kwargs: accepted and ignored.

    Returns:
        ``[batch, q]`` in the dtype of the mask. ``None`` where there is no 2D mask, where there is one token, and where
        a mask that is not traced is all ones. Source: ``create_recurrent_attention_mask`` in Transformers'
        ``masking_utils``.

    >>> create_recurrent_attention_mask(None, jnp.zeros((1, 2, 8)), jnp.array([[0, 1, 1]]))
    Array([[1, 1]], dtype=int32)
    """
    if attention_mask is None:
        return None
    checks.array("attention_mask", attention_mask, "bif")
    q_length = checks.array("inputs_embeds", inputs_embeds, "bif", 2, 3, 4).shape[1]
    if attention_mask.ndim != 2 or q_length == 1 or checks.known(attention_mask, lambda m: m == 1):
        return None
    return jnp.asarray(attention_mask[:, -q_length:])


# The function that makes the mask of a layer type, or the functions where it needs several.
LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING: dict[str, Callable[..., Any] | Mapping[str, Callable[..., Any]]] = {
    "full_attention": create_causal_mask,
    "sliding_attention": create_sliding_window_causal_mask,
    "chunked_attention": create_chunked_causal_mask,
    "compressed_sparse_attention": create_sliding_window_causal_mask,
    "heavily_compressed_attention": create_sliding_window_causal_mask,
    "minimax_m3_sparse": create_causal_mask,
    "indexed_attention": partial(create_causal_mask, allow_is_causal_skip=False),
    "linear_attention": create_recurrent_attention_mask,
    "conv": create_recurrent_attention_mask,
    "hybrid": {"full_attention": create_causal_mask, "linear_attention": create_recurrent_attention_mask},
    "hybrid_sliding": {"sliding_attention": create_causal_mask, "linear_attention": create_recurrent_attention_mask},
}


@_takes_past_key_values
def create_masks_for_generate(
    config: Any,
    inputs_embeds: Embeds,
    attention_mask: Mask2D | Mask4D | TileMap | None,
    cache: Any,
    position_ids: PositionIds | None = None,
    or_mask_function: MaskMod | None = None,
    and_mask_function: MaskMod | None = None,
    block_sequence_ids: BlockIds | None = None,
    **kwargs: object,
) -> Any:
    """The masks that a model needs: a dict by layer type where ``config`` has ``layer_types``, else one mask.

    Args:
        config: read for ``layer_types``, else for ``sliding_window``, else for ``attention_chunk_size``. Where it has
            ``get_text_config()``, that configuration is read instead.
        kwargs: accepted and ignored.

    The other arguments and the errors are those of :func:`create_causal_mask`.

    Returns:
        A mask, or a dict of masks. ``attention_mask`` as it is where a layer type is not known. Source:
        ``create_masks_for_generate`` in Transformers' ``masking_utils``.

    >>> from types import SimpleNamespace
    >>> config = SimpleNamespace(
    ...     _attn_implementation="sdpa", layer_types=["sliding_attention", "full_attention"], sliding_window=2
    ... )
    >>> masks = create_masks_for_generate(config, jnp.zeros((1, 3, 8)), None, None)
    >>> {name: None if mask is None else mask.shape for name, mask in masks.items()}
    {'sliding_attention': (1, 1, 3, 3), 'full_attention': None}
    """
    arguments = {name: value for name, value in locals().items() if name != "kwargs"}
    arguments["config"] = config = config.get_text_config() if hasattr(config, "get_text_config") else config
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None:
        if any(layer_type not in LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING for layer_type in layer_types):
            return attention_mask
        masks: dict[str, Any] = {}
        for layer_type in dict.fromkeys(layer_types):
            functions = LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING[layer_type]
            if not isinstance(functions, Mapping):
                masks[layer_type] = functions(**arguments)
            else:
                masks |= {name: function(**arguments) for name, function in functions.items() if name not in masks}
        return masks
    if getattr(config, "sliding_window", None) is not None:
        return create_sliding_window_causal_mask(**arguments)
    if getattr(config, "attention_chunk_size", None) is not None:
        return create_chunked_causal_mask(**arguments)
    return create_causal_mask(**arguments)
