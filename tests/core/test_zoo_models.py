"""Masks of the zoo are those of Transformers' models: of their own functions, or of what their layers attend to."""

# pyright: reportPrivateUsage=false

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import (
    BigBirdConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    HrmTextConfig,
    HrmTextForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LongformerConfig,
    MistralConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PI0Config,
    PI0Model,
)
from transformers.masking_utils import (
    create_causal_mask,
    create_chunked_causal_mask,
    create_sliding_window_causal_mask,
)
from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdModel
from transformers.models.gemma3.modeling_gemma3 import create_masks_for_vision_model
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention
from transformers.models.mllama.modeling_mllama import _prepare_cross_attention_mask
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)
from transformers.models.pixtral.modeling_pixtral import generate_block_attention_mask
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import VisionAttention

from jaxmask import Causal, Chunked, Mask, Padding, SlidingWindow, zoo
from jaxmask.indices import iota

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]
draws = settings(max_examples=20)
LENGTH = 12
# Transformers says str where it takes a dtype.
DTYPE: Any = torch.float32
sizes = st.integers(1, LENGTH)


def rows(numbers: st.SearchStrategy[int]) -> st.SearchStrategy[list[list[int]]]:
    return st.lists(st.lists(numbers, min_size=LENGTH, max_size=LENGTH), min_size=2, max_size=2)


bits = rows(st.integers(0, 1)).map(np.array)
# The padding before each of two rows. Where there is none, a model may make no mask.
paddings = st.tuples(st.integers(0, 5), st.integers(1, 5))
# The number of tokens of each document in two packed rows: more than one in either.
documents = st.lists(
    st.sets(st.integers(1, LENGTH - 1), min_size=1).map(lambda cuts: np.diff([0, *sorted(cuts), LENGTH]).tolist()),
    min_size=2,
    max_size=2,
)


def read(mask: Mask, query_length: int, key_length: int) -> Bools:
    """The mask written out by its own ``allows``, in NumPy: no shape is compiled for."""
    batch, heads, _ = mask.shape
    allowed = mask.allows(iota(batch, 0), iota(heads, 1), iota(query_length, 2), iota(key_length, 3))
    return np.broadcast_to(np.asarray(allowed), (batch, heads, query_length, key_length))


def for_sdpa(config: Any) -> Any:
    """With this implementation, masks are bools."""
    config._attn_implementation = config.get_text_config()._attn_implementation = "sdpa"
    return config


def left_padded(pads: tuple[int, int]) -> Bools:
    return np.arange(LENGTH) >= np.array(pads)[:, None]


def masks_for_generate(model: Any, config: Any, valid: Bools, **token_types: torch.Tensor) -> Any:
    return model.create_masks_for_generate(
        for_sdpa(config),
        torch.zeros(*valid.shape, 1),
        torch.from_numpy(valid),
        cache=None,
        position_ids=None,
        is_first_iteration=True,
        **token_types,
    )


# Images amid text, and text before which something is seen.


@draws
@given(
    ids=st.lists(st.lists(st.integers(-1, 2), min_size=12, max_size=12), min_size=1, max_size=2),
    window=st.integers(1, 14),
)
@example(ids=[[-1, 0, 0, 0, 0, 0, -1, -1, -1, -1, -1, -1], [-1] * LENGTH], window=3)
def test_gemma3_is_that_of_its_model(ids: list[list[int]], window: int) -> None:
    config = Gemma3TextConfig(sliding_window=window)
    config._attn_implementation = "sdpa"
    masks = create_masks_for_vision_model(
        config, torch.zeros(len(ids), 12, 1), None, None, None, block_sequence_ids=torch.tensor(ids)
    )
    for sliding_window, kind in ((None, "full_attention"), (window, "sliding_attention")):
        allowed = read(zoo.gemma3(np.array(ids), sliding_window), 12, 12)
        np.testing.assert_array_equal(allowed, masks[kind].numpy())


def images_of(is_image: Ints) -> Ints:
    """The number of the image to which a token belongs, where images are apart; -1 for text."""
    begins = np.diff(is_image, prepend=0) > 0
    return np.where(is_image, begins.cumsum(1) - 1, -1)


@draws
@given(is_image=bits, pads=paddings, window=sizes)
def test_gemma3_is_that_of_its_model_from_token_types_on(is_image: Ints, pads: tuple[int, int], window: int) -> None:
    config = Gemma3Config(text_config={"sliding_window": window})
    valid = left_padded(pads)
    masks = masks_for_generate(Gemma3ForConditionalGeneration, config, valid, token_type_ids=torch.from_numpy(is_image))
    for sliding_window, kind in ((None, "full_attention"), (window, "sliding_attention")):
        mask = zoo.gemma3(images_of(is_image), sliding_window) & Padding(valid)
        np.testing.assert_array_equal(read(mask, LENGTH, LENGTH), masks[kind].numpy())


@draws
@given(is_image=bits, pads=paddings, window=sizes)
def test_gemma4_has_images_in_local_layers_alone(is_image: Ints, pads: tuple[int, int], window: int) -> None:
    config = Gemma4Config(text_config={"sliding_window": window, "use_bidirectional_attention": "vision"})
    valid = left_padded(pads)
    masks = masks_for_generate(
        Gemma4ForConditionalGeneration, config, valid, mm_token_type_ids=torch.from_numpy(is_image)
    )
    for mask, kind in (
        (Causal(), "full_attention"),
        (zoo.gemma3(images_of(is_image), window), "sliding_attention"),
    ):
        np.testing.assert_array_equal(read(mask & Padding(valid), LENGTH, LENGTH), masks[kind].numpy())


@pytest.mark.parametrize(
    ("model", "make_config", "prefix_type"),
    [
        (PaliGemmaForConditionalGeneration, PaliGemmaConfig, 0),
        (HrmTextForCausalLM, lambda: HrmTextConfig(prefix_lm=True), 1),
    ],
    ids=["paligemma", "hrm_text"],
)
@draws
@given(
    lengths=st.lists(st.integers(0, LENGTH), min_size=2, max_size=2),
    pads=paddings,
)
def test_prefix_lm_is_that_of_a_model(
    model: Any, make_config: Callable[[], Any], prefix_type: int, lengths: list[int], pads: tuple[int, int]
) -> None:
    valid = left_padded(pads)
    is_prefix = np.arange(LENGTH) < np.array(lengths)[:, None]
    token_types = torch.from_numpy(np.where(is_prefix, prefix_type, 1 - prefix_type))
    allowed = masks_for_generate(model, make_config(), valid, token_type_ids=token_types)
    allowed = allowed["full_attention"] if isinstance(allowed, dict) else allowed
    mask = zoo.prefix_lm(np.array(lengths, np.int32)) & Padding(valid)
    np.testing.assert_array_equal(read(mask, LENGTH, LENGTH), allowed.numpy())


@draws
@given(is_image=bits, tiles=rows(st.integers(1, 3)), tokens=st.integers(1, 3))
def test_vision_cross_attention_is_that_of_mllama(is_image: Ints, tiles: list[list[int]], tokens: int) -> None:
    is_image[0, 0] = 1  # At least one image.
    ranges = [get_cross_attention_token_mask(row.tolist(), 1) for row in is_image]
    images = max(map(len, ranges))
    num_tiles = np.array(tiles)[:, :images]
    dense = convert_sparse_cross_attention_mask_to_dense(ranges, num_tiles.tolist(), 3, LENGTH)
    # A row without an image is unmasked, and its output is set to zero.
    bias, has_image = _prepare_cross_attention_mask(torch.from_numpy(dense), tokens, DTYPE)
    expected = (bias == 0) & has_image.bool()

    intervals = np.zeros((2, images, 2), np.int64)
    for row, of_row in enumerate(ranges):
        for image, (start, end) in enumerate(of_row):
            intervals[row, image] = start, LENGTH if end == -1 else end
    is_tile = np.arange(3) < num_tiles[..., None]
    mask = zoo.vision_cross_attention(intervals, 3 * tokens) & Padding(is_tile.reshape(2, -1).repeat(tokens, 1))
    np.testing.assert_array_equal(read(mask, LENGTH, 3 * tokens * images), expected.numpy())


# Packed documents and groups.


@pytest.mark.parametrize(
    ("create", "make_config", "mask_of"),
    [
        (create_causal_mask, lambda _: LlamaConfig(), lambda _: Causal()),
        (create_sliding_window_causal_mask, lambda size: MistralConfig(sliding_window=size), SlidingWindow),
        (
            create_chunked_causal_mask,
            lambda size: Llama4TextConfig(attention_chunk_size=size),
            lambda size: Causal() & Chunked(size),
        ),
    ],
    ids=["llama", "mistral", "llama4"],
)
@draws
@given(lengths=documents, size=sizes)
def test_documents_are_those_of_a_decoder_whose_positions_begin_anew(
    create: Callable[..., Any],
    make_config: Callable[[int], Any],
    mask_of: Callable[[int], Mask],
    lengths: list[list[int]],
    size: int,
) -> None:
    positions = np.array([[i for length in row for i in range(length)] for row in lengths])
    expected = create(
        for_sdpa(make_config(size)), torch.zeros(2, LENGTH, 1), None, None, position_ids=torch.from_numpy(positions)
    )
    mask = zoo.document(mask_of(size), zoo.segment_ids_from_position_ids(positions))
    np.testing.assert_array_equal(read(mask, LENGTH, LENGTH), expected.numpy())


@draws
@given(lengths=documents)
def test_packed_images_are_those_of_pixtral(lengths: list[list[int]]) -> None:
    for row in lengths:
        bias = generate_block_attention_mask(row, torch.zeros(1, LENGTH, 1))
        mask = zoo.packed(zoo.segment_ids_from_lengths(np.array([row]), LENGTH))
        np.testing.assert_array_equal(read(mask, LENGTH, LENGTH), bias.numpy() == 0)


@draws
@given(lengths=documents)
def test_cu_seqlens_are_read_as_in_qwen2_vl(lengths: list[list[int]]) -> None:
    config: Any = Qwen2VLVisionConfig(embed_dim=LENGTH, num_heads=1)
    config._attn_implementation = "eager"
    layer = VisionAttention(config).eval()
    for row in lengths:
        ends = np.cumsum([0, *row], dtype=np.int32)
        with torch.no_grad():
            for weight in layer.parameters():
                weight.zero_()
            # All scores are equal and every value is a token of its own: what comes out is the attention.
            layer.qkv.weight[-LENGTH:] = layer.proj.weight[:] = torch.eye(LENGTH)
            none = torch.zeros(LENGTH, LENGTH)
            attention = layer(torch.eye(LENGTH), torch.from_numpy(ends), position_embeddings=(none, none))
        mask = zoo.packed(zoo.segment_ids_from_cu_seqlens(ends[None], LENGTH))
        np.testing.assert_array_equal(read(mask, LENGTH, LENGTH)[0, 0], attention.numpy() > 0)


@pytest.fixture(scope="module")
def pi0() -> PI0Model:
    text = {
        "model_type": "gemma",
        "vocab_size": 8,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 4,
        "patch_size": 4,
    }
    images_and_text = {"model_type": "paligemma", "text_config": text, "vision_config": vision, "projection_dim": 8}
    return PI0Model(PI0Config(vlm_config=images_and_text, dit_config=text)).eval()


@draws
@given(
    prefix=sizes,
    actions=st.integers(1, 5),
    pads=paddings,
)
def test_ordered_groups_are_those_of_pi0(pi0: PI0Model, prefix: int, actions: int, pads: tuple[int, int]) -> None:
    """Images and text, then a state, then actions: the first are in the cache when the others come."""
    valid = np.arange(prefix) >= np.array(pads)[:, None]
    seen: list[torch.Tensor] = []

    def see(_: Any, __: Any, arguments: dict[str, Any]) -> None:
        seen.append(arguments["attention_mask"])

    decoders: list[Any] = [pi0.vlm.language_model, pi0.dit]
    hooks = [decoder.layers[0].self_attn.register_forward_pre_hook(see, with_kwargs=True) for decoder in decoders]
    with torch.no_grad():
        cache = pi0.vlm(
            inputs_embeds=torch.zeros(2, prefix, 8),
            attention_mask=torch.from_numpy(valid).long(),
            token_type_ids=torch.zeros(2, prefix, dtype=torch.long),
            use_cache=True,
        ).cache
        pi0(torch.zeros(2, 1 + actions, 8), attention_mask=torch.from_numpy(valid).long(), cache=cache)
    for hook in hooks:
        hook.remove()
    of_prefix, of_others = (mask.numpy() for mask in seen)
    length = prefix + 1 + actions
    expected = np.concatenate([np.pad(of_prefix, ((0, 0), (0, 0), (0, 0), (0, length - prefix))), of_others], 2)
    mask = zoo.ordered_groups(np.array([[0] * prefix + [1] + [2] * actions]))
    all_valid = np.pad(valid, ((0, 0), (0, length - prefix)), constant_values=True)
    np.testing.assert_array_equal(read(mask & Padding(all_valid), length, length), expected)


# Windows with global tokens, and blocks.


@draws
@given(window=st.sampled_from([4, 8, 16]), is_global=st.lists(st.booleans(), min_size=32, max_size=32))
def test_longformer_attends_as_in_transformers(window: int, is_global: list[bool]) -> None:
    length = len(is_global)
    config = LongformerConfig(
        hidden_size=length, num_attention_heads=1, attention_window=[window], attention_probs_dropout_prob=0.0
    )
    layer = LongformerSelfAttention(config, layer_id=0).eval()
    with torch.no_grad():
        for name, weight in layer.named_parameters():
            # All scores are equal and every value is a token of its own: what comes out is the attention.
            weight.copy_(torch.eye(length) if name in ("value.weight", "value_global.weight") else torch.zeros(()))
        marked = torch.tensor([is_global])
        (attention,) = layer(
            torch.eye(length)[None],
            attention_mask=marked * 10000.0,
            is_index_masked=torch.zeros_like(marked),
            is_index_global_attn=marked,
            is_global_attn=any(is_global),
        )
    mask = zoo.longformer(window, np.array([is_global]))
    np.testing.assert_array_equal(read(mask, length, length)[0, 0], attention[0].numpy() > 0)


@pytest.mark.parametrize("training", [True, False], ids=["random", "of-inference"])
@pytest.mark.parametrize(("blocks", "count"), [(8, 3), (12, 2), (16, 3)])
def test_bigbird_attends_as_in_transformers(blocks: int, count: int, training: bool) -> None:
    heads, size = 2, 4
    length = blocks * size
    config = BigBirdConfig(hidden_size=8, num_attention_heads=heads, num_random_blocks=count, block_size=size)
    layer = BigBirdBlockSparseAttention(config, seed=7).train(training)
    plan = layer._get_rand_attn_plan(length, size, count)
    np.random.seed(layer.seed)
    random_blocks = layer._bigbird_block_rand_mask_with_head(length, length, size, size, heads, *plan)
    blocked, band, queries, keys = BigBirdModel.create_masks_for_block_sparse_attn(torch.ones(1, length), size)
    with torch.no_grad():
        _, attention = layer(torch.zeros(1, length, 8), band, queries, keys, blocked, blocked)
    mask = zoo.bigbird(np.stack(random_blocks), size)
    np.testing.assert_array_equal(read(mask, length, length), attention.numpy() > 0)
