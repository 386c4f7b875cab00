"""Numbers at the limits of their dtype are refused by name, or mean what they mean to integers without limits."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmask import Causal, Chunked, Dense, Mask, Prefix, Segments, SlidingWindow, Window, zoo
from jaxmask.positions import LIMIT
from jaxmask.spans import Span

INT32_MAX = 2**31 - 1
EDGES = (0, 1, 7, 127, 128, 255, 2**15, 2**16, LIMIT, 2**30 + 1, INT32_MAX, 2**31, 2**32, 2**62)
DTYPES = (np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64)
POSITIONS = np.array([-LIMIT, 1 - LIMIT, -256, -1, 0, 1, 2, 255, 2**16, LIMIT - 1, LIMIT], np.int32)
KEYS = 300
RANDOM = np.random.default_rng(0)
TABLE, IS_GLOBAL = RANDOM.random((3, 3)) < 0.5, np.array([[1, 0, 1]])
STARTS, ENDS = np.array([[-5, 2**16]], np.int32), np.array([[3, INT32_MAX]], np.int32)

few = settings(max_examples=12)
numbers = st.builds(
    lambda edge, sign, step: sign * edge + step, st.sampled_from(EDGES), st.sampled_from((1, -1)), st.integers(-2, 2)
)


@dataclass(frozen=True)
class Case:
    """A mask of a few numbers, and its definition in Python: ``allows(numbers..., q, kv)``."""

    build: Callable[..., Mask]
    allows: Callable[..., bool]
    arguments: tuple[str, ...]
    # Whether each may be traced, and its lowest value.
    lowest: tuple[int, ...] | None = None


def in_table(q: int, kv: int, size: int, start: int) -> bool:
    row, column = (q - start) // size, (kv - start) // size
    return 0 <= row < 3 and 0 <= column < 3 and bool(TABLE[row, column])


def is_global(position: int) -> bool:
    return position in (0, 2)


def diffuses(length: int, size: int, q: int, kv: int) -> bool:
    (q_half, q_place), (kv_half, kv_place) = divmod(q, length), divmod(kv, length)
    same, before = q_place // size == kv_place // size, kv_place // size < q_place // size
    return (q_half == kv_half and same) or (kv >= length and before)


def is_near(q: int, kv: int, reach: int, step: int) -> bool:
    return abs(q - kv) <= reach and (q - kv) % step == 0


def in_head(prompt: int, tokens: int, width: int, q: int, kv: int) -> bool:
    return q < prompt or kv < prompt or abs((q - prompt) % tokens - (kv - prompt) % tokens) < width * tokens // 3


CASES: dict[str, Case] = {
    "SlidingWindow": Case(SlidingWindow, lambda n, q, kv: 0 <= q - kv < n, ("size",), (1,)),
    "Window": Case(Window, lambda n, m, q, kv: q - n <= kv <= q + m, ("left", "right"), (0, 0)),
    "Chunked": Case(Chunked, lambda n, s, q, kv: (q - s) // n == (kv - s) // n, ("size", "start"), (1, -INT32_MAX)),
    "Prefix": Case(Prefix, lambda n, q, kv: kv < n, ("length",), (0,)),
    "Segments": Case(
        lambda offset: Segments(STARTS, STARTS, offset),
        lambda o, q, kv: 0 <= q - o < 2 and 0 <= kv < 2 and q - o == kv,
        ("offset",),
        (-LIMIT,),
    ),
    "Dense": Case(
        lambda offset: Dense(TABLE, offset),
        lambda o, q, kv: 0 <= q - o < 3 and 0 <= kv < 3 and bool(TABLE[q - o, kv]),
        ("offset",),
        (-LIMIT,),
    ),
    "Axis": Case(
        lambda size, stride, start: zoo.Axis(Chunked(5), size, stride, start),
        lambda n, d, s, q, kv: (q - s) // d % n // 5 == (kv - s) // d % n // 5,
        ("size", "stride", "start"),
        (1, 1, -LIMIT),
    ),
    "Blocks": Case(
        lambda size, start: zoo.Blocks(TABLE, size, start),
        lambda n, s, q, kv: in_table(q, kv, n, s),
        ("size", "start"),
        (1, -LIMIT),
    ),
    "prefix_lm": Case(zoo.prefix_lm, lambda n, q, kv: kv <= q or kv < n, ("prefix_length",), (0,)),
    "streaming_llm": Case(
        zoo.streaming_llm,
        lambda n, m, q, kv: kv <= q and (kv < n or q - kv < m),
        ("start_size", "recent_size"),
        (0, 1),
    ),
    "dilated": Case(
        zoo.dilated_sliding_window, lambda n, d, q, kv: is_near(q, kv, n, d), ("window_size", "dilation"), (0, 1)
    ),
    "global": Case(
        lambda window_size: zoo.global_sliding_window(window_size, IS_GLOBAL),
        lambda n, q, kv: abs(q - kv) <= n or is_global(q) or is_global(kv),
        ("window_size",),
        (0,),
    ),
    "longformer": Case(
        lambda attention_window, dilation: zoo.longformer(attention_window, IS_GLOBAL, dilation),
        lambda n, d, q, kv: is_near(q, kv, n // 2 * d, d) or is_global(q) or is_global(kv),
        ("attention_window", "dilation"),
    ),
    "longformer-traced": Case(
        lambda dilation: zoo.longformer(254, IS_GLOBAL, dilation),
        lambda d, q, kv: is_near(q, kv, 127 * d, d) or is_global(q) or is_global(kv),
        ("dilation",),
        (1,),
    ),
    "batchify": Case(
        lambda batchify_size: zoo.batchify(Prefix(7), batchify_size),
        lambda n, q, kv: q // n == kv // n and kv % n < 7,
        ("batchify_size",),
        (1,),
    ),
    "jetspec_training": Case(
        zoo.jetspec_training,
        lambda n, m, q, kv: kv < n or (kv <= q and (q - n) // m == (kv - n) // m),
        ("prefix_length", "block_size"),
        (0, 1),
    ),
    "jetspec_tree": Case(
        lambda prefix_length: zoo.jetspec_tree(prefix_length, TABLE),
        lambda n, q, kv: kv < n or in_table(q, kv, 1, n),
        ("prefix_length",),
        (0,),
    ),
    "block_diffusion": Case(zoo.block_diffusion, diffuses, ("seq_len", "block_size"), (1, 1)),
    "natten": Case(
        lambda height, width: zoo.natten((height, width), (1, 1)),
        lambda n, m, q, kv: q % m == kv % m and q // m % n == kv // m % n,
        ("canvas", "canvas"),
    ),
    "sta": Case(
        lambda canvas, text: zoo.sta((canvas,), (1,), (1,), text),
        lambda n, m, q, kv: (q % n == kv % n or q >= n or kv >= n) and kv < n + m,
        ("canvas", "text_seq_len", "length"),
    ),
    "svg_spatial_head": Case(
        lambda prompt, tokens, width: zoo.svg_spatial_head(prompt, tokens, width, attn_sink=True, round_width=1),
        lambda n, m, w, q, kv: q < n or kv < n + m or abs(q - kv) < w * m,
        ("prompt_length", "token_per_frame", "width", "length"),
    ),
    "svg_temporal_head": Case(
        lambda prompt, tokens, width: zoo.svg_temporal_head(prompt, 3, tokens, width),
        in_head,
        ("prompt_length", "token_per_frame", "width"),
    ),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def expected(case: Case, values: list[int]) -> list[list[bool]]:
    return [[case.allows(*values, q, kv) for kv in POSITIONS.tolist()] for q in POSITIONS.tolist()]


def allowed(mask: Mask, library: Any) -> Any:
    q, kv = library.asarray(POSITIONS)[None, None, :, None], library.asarray(POSITIONS)[None, None, None]
    zero = np.zeros((1, 1, 1, 1), np.int32)
    return np.broadcast_to(np.asarray(mask.allows(zero, zero, q, kv)), (1, 1, *2 * POSITIONS.shape))[0, 0]


def check_tiles(mask: Mask, pairs: Any) -> None:
    zero = np.zeros((1, 1, 1, 1), np.int32)
    for size in (1, 3, POSITIONS.size):
        q, kv = Span(POSITIONS.reshape(1, 1, -1, 1), 2, size), Span(POSITIONS.reshape(1, 1, 1, -1), 3, size)
        tiles = math.ceil(POSITIONS.size / size)
        some, every = (
            np.broadcast_to(np.asarray(x), (1, 1, tiles, tiles)) for x in mask.tile_bounds(zero, zero, q, kv)
        )
        for i, j in np.ndindex(tiles, tiles):
            tile = pairs[i * size : (i + 1) * size, j * size : (j + 1) * size]
            assert some[0, 0, i, j] or not tile.any()
            assert tile.all() or not every[0, 0, i, j]


def check_native(mask: Mask, allows: Callable[[int, int], bool]) -> None:
    """What a mask tells kernels, if anything: the keys of each query."""
    terms, zero = mask.native(), np.zeros((1, 1, 1, 1), np.int32)
    if terms is None:
        return
    start, end = terms.keys(zero, POSITIONS.reshape(1, 1, -1, 1), KEYS)
    found = (start <= np.arange(KEYS)) & (np.arange(KEYS) < end)
    exact = [[allows(q, kv) for kv in range(KEYS)] for q in POSITIONS.tolist()]
    np.testing.assert_array_equal(np.broadcast_to(found, (1, 1, POSITIONS.size, KEYS))[0, 0], exact)


@every_case
@few
@given(data=st.data())
def test_a_static_number_is_right_or_refused_by_name(case: Case, data: st.DataObject) -> None:
    count = len(case.lowest or case.allows.__code__.co_varnames[: case.allows.__code__.co_argcount - 2])
    values = [data.draw(numbers) for _ in range(count)]
    fitting = [[int, *(d for d in DTYPES if np.iinfo(d).min <= value <= np.iinfo(d).max)] for value in values]
    arguments = [data.draw(st.sampled_from(dtypes))(value) for value, dtypes in zip(values, fitting, strict=True)]
    try:
        mask, problem = case.build(*arguments), None
    except ValueError as error:
        mask, problem = None, str(error)
    if mask is None:
        assert problem is not None
        assert problem.startswith(case.arguments)
        # An attention window is refused where it is odd, too.
        assert max(map(abs, values)) > 2**15 or min(values) < 1 or case.arguments[0] == "attention_window"
        return
    pairs = expected(case, values)
    for library in (np, jnp):
        np.testing.assert_array_equal(allowed(mask, library), pairs)
    check_tiles(mask, np.array(pairs))
    check_native(mask, lambda q, kv: case.allows(*values, q, kv))


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items() if case.lowest])
@few
@given(data=st.data())
def test_a_traced_number_is_right(case: Case, data: st.DataObject) -> None:
    assert case.lowest
    # Positions, and the coordinates of an axis, have a limit of their own.
    values = [data.draw(numbers.filter(lambda value, low=low: low <= value <= LIMIT)) for low in case.lowest]
    fitting = [[d for d in DTYPES[:6] if np.iinfo(d).min <= value <= np.iinfo(d).max] for value in values]
    arguments = [
        jnp.asarray(value, data.draw(st.sampled_from(dtypes))) for value, dtypes in zip(values, fitting, strict=True)
    ]
    mask, pairs = case.build(*arguments), expected(case, values)
    np.testing.assert_array_equal(allowed(mask, jnp), pairs)
    check_tiles(mask, np.array(pairs))
    check_native(mask, lambda q, kv: case.allows(*values, q, kv))


@given(size=st.integers(1, 9), length=numbers, dtype=st.sampled_from(DTYPES))
def test_the_positions_of_a_ring_are_right_or_refused(size: int, length: int, dtype: Any) -> None:
    if not np.iinfo(dtype).min <= length <= np.iinfo(dtype).max:
        return
    if not 0 <= length <= INT32_MAX:
        with pytest.raises(ValueError, match="length must be at least 0"):
            zoo.ring_positions(size, dtype(length))
        return
    last = length - 1
    slots = [last - (last - slot) % size for slot in range(size)]
    np.testing.assert_array_equal(zoo.ring_positions(size, dtype(length)), slots)
    np.testing.assert_array_equal(zoo.ring_positions(dtype(size), jnp.asarray(length, jnp.int32)), slots)


@pytest.mark.parametrize("dtype", DTYPES[:7])
def test_positions_and_ids_of_any_dtype_do_not_overflow(dtype: Any) -> None:
    info = np.iinfo(dtype)
    values = np.array([[max(info.min, -LIMIT), 0, 1, min(info.max, LIMIT)]], dtype)
    for array in (values, jnp.asarray(values)):
        near = zoo.Reordered(Window(200, 0), array)
        exact = [[0 <= q - kv <= 200 for kv in values[0].tolist()] for q in values[0].tolist()]
        np.testing.assert_array_equal(near.dense(4, 4)[0, 0], exact)
        between = zoo.Between(array, array)
        assert not between.dense(4, 4).any()
        ids = values[0].tolist()
        own = [[kv <= q and ids[kv] == ids[q] for kv in range(4)] for q in range(4)]
        np.testing.assert_array_equal(zoo.document(Causal(), array).dense(4, 4)[0, 0], own)
        shared = zoo.shared_prefix(jnp.asarray(array), jnp.zeros((1, 300), jnp.int32))
        pairs = [
            [own[q][kv] if ids[q] == ids[kv] else 0 <= ids[q] < 300 and ids[kv] == 0 for kv in range(4)]
            for q in range(4)
        ]
        np.testing.assert_array_equal(shared.dense(4, 4)[0, 0], pairs)


def test_a_tile_larger_than_a_table_is_not_full() -> None:
    # Its area in blocks is 2**32, which an int32 counts as 0: as many as there are allowed.
    mask = zoo.Blocks(np.zeros((2, 2), np.bool_), size=1)
    zero = np.zeros((1, 1, 1, 1), np.int32)
    q = Span(np.array([0, 2**16 - 1], np.int32).reshape(1, 1, 2, 1), 2, 2)
    kv = Span(np.array([0, 2**16 - 1], np.int32).reshape(1, 1, 1, 2), 3, 2)
    some, every = mask.tile_bounds(zero, zero, q, kv)
    assert not np.any(some)
    assert not np.any(every)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "offset": (lambda: Causal().dense(4, 4, offset=INT32_MAX), "offset must be at least"),
    "query-positions": (
        lambda: Causal().dense(1, 4, query_positions=np.array([LIMIT + 1])),
        "query_positions must be at least",
    ),
    "offset-of-tiles": (lambda: Causal().tiles(4, 4, offset=INT32_MAX), "offset must be at least"),
    "offset-of-numpy": (lambda: Causal().dense(4, 4, offset=np.array([INT32_MAX])), "offset must be at least"),
    "keys": (lambda: Window(None, 5).tiles(1, LIMIT + 2, block=2**24, offset=0), "key_length must be at least 1 and"),
    "queries": (lambda: Window(None, 5).tiles(LIMIT + 2, 1, block=2**24, offset=0), "query_length must be at least 1"),
    "canvas": (lambda: zoo.natten((2**16, 2**16), (3, 3)), "canvas must hold at most"),
    "canvas-of-few-bits": (lambda: zoo.sta((np.uint8(128),) * 5, (1,) * 5, (1,) * 5), "canvas must hold at most"),
    "images": (
        lambda: zoo.vision_cross_attention(np.zeros((1, 4, 2), np.int32), 2**30),
        r"image_token_length \* images must be",
    ),
    "tiles": (lambda: zoo.vsa(np.zeros((1, 1, 1, 1), np.int32), 2**20, 2**20), r"tile_numel \* num_kv_tiles must be"),
    "widths": (lambda: zoo.svg_spatial_head(0, 2**30 - 1, 2**30), "width . token_per_frame.*must be"),
}


@pytest.mark.parametrize(("call", "says"), REFUSED.values(), ids=REFUSED.keys())
def test_a_number_beyond_the_limits_is_refused(call: Callable[[], Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()


# Each of these once wrapped, or was taken.


@pytest.mark.parametrize("start", [INT32_MAX, -INT32_MAX])
@pytest.mark.parametrize("as_given", [int, np.int32, np.array, jnp.array], ids=["int", "int32", "numpy", "jax"])
def test_chunks_from_the_last_of_integers_on_are_those_of_int64(start: int, as_given: Any) -> None:
    q, kv = np.ogrid[:5, :5]
    expected = (q - np.int64(start)) // 3 == (kv - np.int64(start)) // 3
    np.testing.assert_array_equal(Chunked(3, as_given(start)).dense(5, 5)[0, 0], expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_empty_ring_has_no_positions(dtype: Any) -> None:
    np.testing.assert_array_equal(zoo.ring_positions(4, dtype(0)), [-4, -3, -2, -1])


@pytest.mark.parametrize("build", [SlidingWindow, lambda n: Window(n, None), lambda n: Window(0, n), Prefix, Chunked])
def test_a_negative_number_in_an_array_of_numpy_is_refused(build: Any) -> None:
    with pytest.raises(ValueError, match=r"must be at least [01] and fit an int32, got int64\[\] from -1 to -1"):
        build(np.array(-1))


def test_the_ends_of_positions_do_not_wrap() -> None:
    far = Window(None, 5).dense(1, 1, offset=-LIMIT, key_positions=np.array([LIMIT]))
    assert not far.any()
    assert jax.jit(lambda at: Window(5, None).dense(1, 1, offset=at))(jnp.int32(INT32_MAX)).sum() == 0
