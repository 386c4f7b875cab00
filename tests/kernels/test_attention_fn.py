"""Attention as Flax's modules call it: what they pass is honoured or refused, and nothing is ignored."""

import inspect
import re
from collections import Counter
from functools import partial
from typing import Any

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmask import Causal, Dense, Full, Mask, Padding, Prefix, SlidingWindow, attention, make_attention_fn

LENGTH, HEADS, FEATURES = 12, 2, 8
VALID = jnp.asarray(np.arange(LENGTH) >= np.array([[0], [4]]))
X = jnp.asarray(np.random.default_rng(0).standard_normal((2, LENGTH, FEATURES)), jnp.float32)
FUNCTIONS = {"linen": linen.dot_product_attention, "nnx": nnx.dot_product_attention}
every_flax = pytest.mark.parametrize("theirs", FUNCTIONS.values(), ids=FUNCTIONS)


def some(*shape: int, seed: int = 1) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def heads(*batch: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    query, key, value = (some(*batch, LENGTH, HEADS, 4, seed=seed) for seed in range(3))
    return query, key, value


def readable(mask: Mask) -> Any:
    """The mask written out, and every query attends to itself: of nothing, Flax makes the mean."""
    return mask.dense(LENGTH, LENGTH) | jnp.eye(LENGTH, dtype=bool)


def same(actual: Any, expected: Any, tolerance: float = 2e-6) -> None:
    assert actual.dtype == expected.dtype
    scale = float(np.abs(np.asarray(expected, np.float64)).max())
    np.testing.assert_allclose(
        np.asarray(actual, np.float64), np.asarray(expected, np.float64), rtol=0, atol=tolerance * scale
    )


def linen_layer(x: Any, attention_fn: Any, **call: Any) -> Any:
    def output(fn: Any, variables: Any = None) -> Any:
        layer = linen.MultiHeadDotProductAttention(num_heads=HEADS, attention_fn=fn)
        return layer.init(jax.random.key(0), x) if variables is None else layer.apply(variables, x, **call)

    return output(attention_fn, output(linen.dot_product_attention))


def nnx_layer(x: Any, attention_fn: Any, **call: Any) -> Any:
    layer = nnx.MultiHeadAttention(HEADS, FEATURES, attention_fn=attention_fn, decode=False, rngs=nnx.Rngs(0))
    return layer(x, **call)


LAYERS = {"linen": (linen_layer, linen.dot_product_attention), "nnx": (nnx_layer, nnx.dot_product_attention)}
every_layer = pytest.mark.parametrize(("layer", "theirs"), LAYERS.values(), ids=LAYERS)
BASE = SlidingWindow(5)


@every_layer
def test_a_layer_attends_as_with_the_dense_mask(layer: Any, theirs: Any) -> None:
    same(layer(X, make_attention_fn(BASE)), layer(X, theirs, mask=BASE.dense(LENGTH, LENGTH)))


@every_layer
def test_the_mask_of_the_call_is_joined_to_the_description(layer: Any, theirs: Any) -> None:
    mask = readable(Padding(VALID))
    actual = layer(X, make_attention_fn(BASE), mask=mask)
    same(actual, layer(X, theirs, mask=mask & BASE.dense(LENGTH, LENGTH)))


@every_layer
def test_gradients_of_a_layer_are_those_with_the_dense_mask(layer: Any, theirs: Any) -> None:
    actual = jax.grad(lambda x: layer(x, make_attention_fn(BASE)).sum())(X)
    same(actual, jax.grad(lambda x: layer(x, theirs, mask=BASE.dense(LENGTH, LENGTH)).sum())(X))


@every_flax
def test_bias_and_numeric_mask_are_honoured(theirs: Any) -> None:
    arrays, bias = heads(2), some(1, HEADS, LENGTH, LENGTH, seed=5)
    mask = readable(Padding(VALID)).astype(jnp.float32)
    actual = make_attention_fn(BASE)(*arrays, bias=bias, mask=mask)
    same(actual, theirs(*arrays, bias=bias, mask=(mask > 0) & BASE.dense(LENGTH, LENGTH)))


@every_flax
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)], ids=str)
def test_any_number_of_batch_dimensions(theirs: Any, batch: tuple[int, ...]) -> None:
    arrays = heads(*batch)
    mask = some(*batch, 1, LENGTH, LENGTH, seed=6) > 0
    mask = mask | jnp.eye(LENGTH, dtype=bool)
    bias = some(*(1 for _ in batch), HEADS, 1, LENGTH, seed=7)
    actual = make_attention_fn(BASE)(*arrays, bias=bias, mask=mask)
    same(actual, theirs(*arrays, bias=bias, mask=mask & BASE.dense(LENGTH, LENGTH)[(0,) * (not batch)]))


@every_flax
def test_the_dtype_is_honoured(theirs: Any) -> None:
    arrays = heads(2)
    actual = make_attention_fn(Full())(*arrays, dtype=jnp.bfloat16)
    same(actual, theirs(*arrays, dtype=jnp.bfloat16), tolerance=2e-2)


def test_a_function_that_promotes_dtypes_is_honoured() -> None:
    def in_half(arrays: Any, dtype: Any) -> Any:
        assert dtype is None
        return tuple(x.astype(jnp.float16) for x in arrays)

    assert make_attention_fn()(*heads(2), promote_dtype=in_half).dtype == jnp.float16


def test_is_causal_is_joined_to_the_description() -> None:
    arrays = heads(2)
    actual = make_attention_fn(Padding(jnp.ones((1, LENGTH), bool)))(*arrays, is_causal=True)
    same(actual, nnx.dot_product_attention(*arrays, is_causal=True))


def test_no_description_is_no_mask() -> None:
    arrays = heads(2)
    same(make_attention_fn()(*arrays), linen.dot_product_attention(*arrays))


def test_dropout_is_no_matter_where_it_is_deterministic() -> None:
    arrays = heads(2)
    same(make_attention_fn()(*arrays, dropout_rate=0.5, deterministic=True), make_attention_fn()(*arrays))


@every_flax
def test_every_parameter_of_flax_is_one_of_ours(theirs: Any) -> None:
    # For linen drops, without a word, what an attention function has no parameter for.
    missing = set(inspect.signature(theirs).parameters) - set(inspect.signature(make_attention_fn()).parameters)
    assert missing == set()


REFUSED: dict[str, Any] = {
    "precision": (jax.lax.Precision.HIGHEST, jax.lax.Precision.DEFAULT),
    "module": linen.Dense(3),
    "einsum_dot_general": jax.lax.dot_general,
    "qk_attn_weights_einsum": jnp.einsum,
    "attn_weights_value_einsum": jnp.einsum,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_honoured_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        make_attention_fn()(*heads(2), **{name: REFUSED[name]})


@pytest.mark.parametrize("name", ["high", "highest"])
@pytest.mark.parametrize("implementation", ["xla", "blocked"])
def test_all_products_have_the_precision_of_the_call(implementation: Any, name: str) -> None:
    def products(*arrays: Any, **how: Any) -> Counter[str]:
        """The number of products, and how often each precision is that of one, in the output and its gradients."""

        def attend(*arrays: Any) -> jax.Array:
            # Made inside, so that offset, sinks and mask are traced, too.
            attend = make_attention_fn(BASE, offset=arrays[3], sinks=arrays[4], implementation=implementation)
            return attend(*arrays[:3], **how).sum()

        program = str(jax.make_jaxpr(jax.grad(attend, (0, 1, 2, 4)))(*arrays, jnp.int32(0), jnp.ones(HEADS)))
        return Counter(re.findall(r"precision=\S+|dot_general\[", program))

    arrays = heads(2)
    none = products(*arrays)
    assert none == products(*arrays, precision="default") == products(*arrays, precision=jax.lax.Precision.DEFAULT)
    wanted = products(*arrays, precision=name)
    assert wanted == products(*arrays, precision=(name, jax.lax.Precision[name.upper()]))
    assert none.total() < 2 * none["dot_general["]
    assert wanted.total() == 2 * wanted["dot_general["] == 2 * none["dot_general["]


def test_a_precision_changes_no_output_nor_gradient() -> None:
    def gradients(*arrays: Any, **how: Any) -> Any:
        attend = make_attention_fn(BASE, implementation="blocked")
        return jax.value_and_grad(lambda *arrays: attend(*arrays, **how).sum(), (0, 1, 2))(*arrays)

    # On a CPU every product is of the highest precision.
    jax.tree.map(same, gradients(*heads(2), precision="highest"), gradients(*heads(2)))
    attend = make_attention_fn(SlidingWindow(3))
    same(jax.vmap(partial(attend, precision="highest"))(*heads(2)), attend(*heads(2)))


@pytest.mark.parametrize("is_broadcast", [True, False])
def test_dropout_keeps_what_it_does_not_drop(is_broadcast: bool) -> None:
    query, key, _ = heads(3)
    value = jnp.broadcast_to(jnp.eye(LENGTH)[None, :, None], (3, LENGTH, HEADS, LENGTH))
    attend = make_attention_fn(BASE)
    weights = attend(query, key, value)
    kept = attend(*(query, key, value), dropout_rate=0.5, dropout_rng=jax.random.key(0), broadcast_dropout=is_broadcast)
    is_kept = kept != 0
    np.testing.assert_allclose(kept, jnp.where(is_kept, 2 * weights, 0), rtol=1e-6)
    is_shared = bool((is_kept == is_kept[:1, :, :1]).all())
    assert is_shared == is_broadcast


def test_layers_drop_weights() -> None:
    layer = nnx.MultiHeadAttention(
        HEADS, FEATURES, dropout_rate=0.5, attention_fn=make_attention_fn(), decode=False, rngs=nnx.Rngs(0, dropout=1)
    )
    assert jnp.all(layer(X, deterministic=False) != layer(X, deterministic=True))
    module = linen.MultiHeadDotProductAttention(num_heads=HEADS, dropout_rate=0.5, attention_fn=make_attention_fn())
    variables = module.init(jax.random.key(0), X, deterministic=True)
    rngs = {"dropout": jax.random.key(1)}
    dropped = module.apply(variables, X, deterministic=False, rngs=rngs)
    assert jnp.all(dropped != module.apply(variables, X, deterministic=True))


@every_layer
def test_the_mask_of_a_call_may_be_a_description(layer: Any, theirs: Any) -> None:
    mask = Causal() & Prefix(jnp.array([10, 4]))
    same(layer(X, make_attention_fn(BASE), mask=mask | BASE), layer(X, theirs, mask=BASE.dense(LENGTH, LENGTH)))
    same(layer(X, make_attention_fn(), mask=mask), layer(X, theirs, mask=mask.dense(LENGTH, LENGTH)))


def test_a_float_mask_is_of_zeros_and_ones() -> None:
    arrays = heads(2)
    mask = BASE.dense(LENGTH, LENGTH)
    attend = make_attention_fn()
    expected = attend(*arrays, mask=mask)
    same(attend(*arrays, mask=mask.astype(jnp.float32)), expected)
    same(jax.jit(lambda mask: attend(*arrays, mask=mask))(mask.astype(jnp.float32)), expected)
    additive = BASE.bias(LENGTH, LENGTH)
    with pytest.raises(ValueError, match="give it as bias"):
        attend(*arrays, mask=additive)
    assert jnp.isnan(jax.jit(lambda mask: attend(*arrays, mask=mask))(additive)).all()
    same(attend(*arrays, bias=additive), expected)


def test_equal_functions_are_equal_so_that_equal_layers_are_traced_once() -> None:
    traced = []

    @partial(jax.jit, static_argnums=0)
    def attend(function: Any, x: Any) -> Any:
        traced.append(function)
        return function(x, x, x)

    query, *_ = heads(2)
    for _ in range(3):
        attend(make_attention_fn(SlidingWindow(3), offset=0), query)
    assert len(traced) == 1
    sinks = jnp.zeros(HEADS)
    for other in (
        make_attention_fn(SlidingWindow(4), offset=0),
        make_attention_fn(SlidingWindow(3)),
        make_attention_fn(SlidingWindow(3), offset=0, implementation="xla"),
        make_attention_fn(SlidingWindow(3), offset=0, sinks=sinks),
    ):
        assert other != traced[0]
    assert make_attention_fn(sinks=sinks) == make_attention_fn(sinks=sinks)
    assert make_attention_fn(sinks=sinks) != make_attention_fn(sinks=jnp.zeros(HEADS))


@every_layer
def test_sown_weights_are_refused(layer: Any, theirs: Any) -> None:
    with pytest.raises(ValueError, match="sow_weights=True"):
        layer(X, make_attention_fn(), sow_weights=True)


# A step of decoding with the cache of Flax, which knows the position of the query, and does not say it.


def decoding(attention_fn: Any) -> tuple[Any, Any]:
    layer = linen.MultiHeadDotProductAttention(num_heads=HEADS, attention_fn=attention_fn, decode=True)
    return layer, layer.init(jax.random.key(0), X)


@pytest.mark.parametrize("description", [Causal(), BASE], ids=repr)
def test_decoding_by_a_description_of_positions_asks_for_an_offset(description: Mask) -> None:
    _, variables = decoding(linen.dot_product_attention)
    layer = linen.MultiHeadDotProductAttention(
        num_heads=HEADS, attention_fn=make_attention_fn(description), decode=True
    )
    with pytest.raises(ValueError, match=re.escape("offset is missing: 1 queries and 12 keys")):
        layer.apply(variables, X[:, :1], mutable=["cache"])


def test_nnx_decoding_by_a_description_of_positions_asks_for_an_offset() -> None:
    layer = nnx.MultiHeadAttention(HEADS, FEATURES, attention_fn=make_attention_fn(BASE), decode=True, rngs=nnx.Rngs(0))
    layer.init_cache(X.shape)
    with pytest.raises(ValueError, match="offset is missing"):
        layer(X[:, :1])


@pytest.mark.parametrize("at", [0, 3])
def test_decoding_with_an_offset_is_the_row_of_the_whole(at: int) -> None:
    plain, variables = decoding(linen.dot_product_attention)
    whole = linen.MultiHeadDotProductAttention(num_heads=HEADS, attention_fn=make_attention_fn(BASE))
    expected = whole.apply({"params": variables["params"]}, X)
    cache = variables
    for t in range(at):
        _, state = plain.apply(cache, X[:, t : t + 1], mutable=["cache"])
        cache = {**variables, **state}
    layer = linen.MultiHeadDotProductAttention(
        num_heads=HEADS, attention_fn=make_attention_fn(BASE, offset=jnp.asarray(at)), decode=True
    )
    actual, _ = layer.apply(cache, X[:, at : at + 1], mutable=["cache"])
    same(actual[:, 0], jnp.asarray(expected)[:, at], tolerance=1e-5)


def test_decoding_without_positions_attends_to_the_keys_that_are_there() -> None:
    plain, variables = decoding(linen.dot_product_attention)
    layer = linen.MultiHeadDotProductAttention(num_heads=HEADS, attention_fn=make_attention_fn(), decode=True)
    actual, expected = (module.apply(variables, X[:, :1], mutable=["cache"])[0] for module in (layer, plain))
    same(actual, expected)


def test_the_mask_of_the_call_has_a_row_for_each_query_wherever_they_are() -> None:
    query, key = some(1, 4, 2, 8), some(1, 12, 2, 8)
    given = jnp.asarray(np.random.default_rng(1).random((1, 1, 4, 12)) < 0.7)
    attend = make_attention_fn(Causal(), offset=jnp.int32(8))
    expected = attention(query, key, key, Causal() & Dense(given, offset=8), offset=8)
    np.testing.assert_array_equal(attend(query, key, key, mask=given), expected)


def test_the_mask_of_the_call_cannot_be_aligned_with_an_offset_for_each_example() -> None:
    query, key = jnp.ones((2, 4, 2, 8)), jnp.ones((2, 12, 2, 8))
    attend = make_attention_fn(Causal(), offset=jnp.array([8, 3]))
    with pytest.raises(ValueError, match="offset for each example"):
        attend(query, key, key, mask=jnp.ones((2, 1, 4, 12), bool))
