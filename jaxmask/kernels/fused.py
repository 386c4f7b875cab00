"""Fused kernels that others maintain: cuDNN by way of ``jax.nn``, tokamax, and splash attention.

Each is two functions: what a kernel lacks to do a call, in words, and the call itself.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxmask.kernels.call import Call
from jaxmask.mask import Full
from jaxmask.positions import Positions

# Its results do not say over which axes of the mesh they vary.
_NO_CHECK = "inside of a shard_map it needs check_vma=False"


def cudnn_lacks(call: Call) -> list[str]:
    """What keeps cuDNN from doing this call. JAX says which shapes it takes, where a GPU is at hand."""
    limits = {
        "it needs an NVIDIA GPU": (
            call.platform != "gpu" or (_is_here(call) and "rocm" in jax.devices()[0].client.platform_version)
        ),
        f"it takes float16 and bfloat16, not {call.query.dtype}": call.query.dtype not in (jnp.float16, jnp.bfloat16),
        "it has no logits_soft_cap": call.logits_soft_cap is not None,
    }
    lacks = _that_hold(limits) + _not_native(call)
    if lacks or _is_here(call):
        return lacks or _refusal(_with_gradients(cudnn), call, ValueError, NotImplementedError, RuntimeError)
    dims, window = (call.query.shape[3], call.value.shape[3]), call.split().local_window_size
    return _that_hold(
        {
            f"not every GPU takes dims of {dims[0]} and {dims[1]}: equal, a multiple of 8, at most 128": (
                dims[0] != dims[1] or dims[0] % 8 != 0 or dims[0] > 128
            ),
            "it has no window of keys after the query": window is not None and window[1] != 0,
        }
    )


def cudnn(call: Call) -> Array:
    """By ``jax.nn.dot_product_attention``, which calls cuDNN."""
    return by_jax_nn(call, "cudnn")


def _with_gradients(run: Callable[[Call], Any]) -> Callable[[Call], Any]:
    """A kernel and its gradients: some calls are refused only there, and a call does not know what will be asked."""

    def output_and_gradients(call: Call) -> Any:
        def attend(query: Array, key: Array, value: Array) -> Array:
            return run(replace(call, query=query, key=key, value=value))

        out, pull = jax.vjp(attend, call.query, call.key, call.value)
        return out, pull(out)

    return output_and_gradients


def tokamax_lacks(call: Call) -> list[str]:
    """What keeps tokamax from doing this call."""
    limits = {
        'tokamax is not installed: pip install "jaxmask[tokamax]"': find_spec("tokamax") is None,
        "it caps the scores after the bias, not before": call.logits_soft_cap is not None and call.bias is not None,
        _NO_CHECK: _is_checked(call),
        "it takes no float64": call.query.dtype == jnp.float64,
        "its windows need as many queries as keys": (
            call.split().local_window_size is not None and call.query.shape[1] != call.key.shape[1]
        ),
    }
    lacks = _that_hold(limits) + _not_native(call)
    if not _is_here(call):
        lacks.append(f"what it takes on a {call.platform.upper()} is known only where there is one")
    # Inside a shard_map its own rules of differentiation fail on types.
    return lacks or _refusal(_with_gradients(tokamax), call, NotImplementedError, ExceptionGroup, TypeError, ValueError)


def tokamax_writes_all_pairs(call: Call) -> bool:
    """Whether tokamax, forward or backward, writes an array of all pairs, beside a bias that is one."""
    if call.platform == "cpu" or call.bias is not None:
        return False
    pairs = call.query.shape[1], call.key.shape[1]

    def writes(jaxpr: Any) -> bool:
        return any(
            any(getattr(out.aval, "shape", ())[-2:] == pairs for out in equation.outvars)
            # A kernel writes only what leaves it.
            or (equation.primitive.name != "pallas_call" and any(map(writes, _within(equation.params))))
            for equation in jaxpr.eqns
        )

    return writes(jax.make_jaxpr(_with_gradients(tokamax))(call).jaxpr)


def _within(params: dict[str, Any]) -> list[Any]:
    """The programs inside an equation."""
    found = (getattr(value, "jaxpr", value) for value in jax.tree.leaves(list(params.values())))
    return [value for value in found if hasattr(value, "eqns")]


@jax.jit
def tokamax(call: Call) -> Array:
    """By ``tokamax.dot_product_attention``, which chooses among its own kernels."""
    from absl import flags
    from tokamax import dot_product_attention  # pyright: ignore[reportMissingTypeStubs]

    # Otherwise tokamax parses the arguments of the program for its own flags, and fails on those it does not know.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    # On an accelerator, its kernels alone: it would fall back to one that writes all scores out.
    kernels = None if call.platform == "cpu" else ("mosaic", "triton") if call.platform == "gpu" else ("mosaic",)
    attend = partial(dot_product_attention, logits_soft_cap=call.logits_soft_cap, implementation=kernels)
    return _native(call, attend)


@partial(jax.jit, static_argnames="implementation")
def by_jax_nn(call: Call, implementation: Literal["cudnn", "xla"]) -> Array:
    """By ``jax.nn.dot_product_attention``, with the mask in its own arguments."""
    return _native(call, partial(jax.nn.dot_product_attention, implementation=implementation))


def splash_lacks(call: Call) -> list[str]:
    """What keeps splash attention from doing this call. It takes any mask, and says itself which shapes it takes."""
    limits = {
        "it takes no bias": call.bias is not None,
        "it takes no key_positions": call.positions.keys is not None,
        "it takes no query_positions": call.positions.queries is not None,
        f"the dim of the values must be that of the keys, not {call.value.shape[3]} and {call.query.shape[3]}": (
            call.value.shape[3] != call.query.shape[3]
        ),
        _NO_CHECK: _is_checked(call),
    }
    lacks = _that_hold(limits) + _only_output(call)
    return lacks or _refusal(_splash_of_a_tile, call, TypeError, ValueError, NotImplementedError)


def _splash_of_a_tile(call: Call) -> Array:
    """Splash attention of one tile without a mask: to trace it for a mask takes as long as to run that mask.

    The mask may take minutes, and what splash refuses follows from the shapes and from the block sizes alone.
    """
    from jaxmask.kernels.splash.blocks import default_blocks

    sizes = default_blocks(call.query.shape[1], call.key.shape[1])
    query = call.query[:1, : sizes.block_q]
    key, value = (x[:1, : sizes.block_kv] for x in (call.key, call.value))
    at = Positions(query.shape[1], key.shape[1], None, None, None, True)
    return splash(replace(call, query=query, key=key, value=value, mask=Full(), positions=at))


def splash(call: Call) -> Array:
    """Splash attention; where it is compiled for another platform than TPU, interpreted: slow, and for tests only."""
    from jaxmask.kernels.splash import to_splash

    def run(interpret: bool) -> Array:
        kernel = to_splash(
            call.mask,
            call.query.shape[1],
            call.key.shape[1],
            offset=call.positions.start,
            batch=call.query.shape[0],
            heads=call.query.shape[2],
            attn_logits_soft_cap=call.logits_soft_cap,
            interpret=interpret,
        )
        query, key, value = (x.swapaxes(1, 2) for x in (call.query, call.key, call.value))
        return kernel((query * call.scale).astype(query.dtype), key, value, sinks=call.sinks).swapaxes(1, 2)

    # Chosen by XLA, not by the platform of this process, which may export to another.
    return jax.lax.platform_dependent(tpu=partial(run, False), default=partial(run, True))


def _is_here(call: Call) -> bool:
    """Whether this process runs on the platform of the call, so that its kernels can be asked."""
    return call.platform in ("cpu", jax.default_backend())


def _is_checked(call: Call) -> bool:
    """Whether the call is inside of a ``shard_map`` with ``check_vma=True``, which is the default."""
    return isinstance(call.query, jax.Array) and bool(jax.typeof(call.query).manual_axis_type.varying)


def _that_hold(limits: dict[str, Any]) -> list[str]:
    return [limit for limit, holds in limits.items() if holds]


def _refusal(run: Callable[[Call], Any], call: Call, *errors: type[Exception]) -> list[str]:
    """The first line of the error by which a kernel refuses a call, if it does. Nothing is computed."""
    try:
        jax.eval_shape(run, call)
    except errors as error:
        return [str(error).partition("\n")[0]]
    return []


def _not_native(call: Call) -> list[str]:
    residual = call.split().residual
    limits = {
        f"its arguments do not say {residual!r}": not isinstance(residual, Full),
        "it takes no bias that is a function": callable(call.bias),
        "it takes no query_positions": call.positions.queries is not None and not isinstance(residual, Full),
        "it takes no key_positions": call.positions.keys is not None,
        "it has no sinks": call.sinks is not None,
    }
    return _that_hold(limits) + _only_output(call)


def _only_output(call: Call) -> list[str]:
    limits = {
        "it drops no weights": call.dropout is not None,
        "it returns no log-sum-exp": call.return_residual,
    }
    return _that_hold(limits)


def _native(call: Call, attend: Callable[..., Array]) -> Array:
    split = call.split()
    if not isinstance(split.residual, Full):
        raise AssertionError(f"the arguments of the kernel do not say {split.residual!r}")
    bias: Any = call.bias
    lengths = split.key_value_seq_lengths
    if bias is not None:
        pairs = call.query.shape[1], call.key.shape[1]
        bias = jnp.broadcast_to(jnp.asarray(bias, call.query.dtype), (*np.shape(bias)[:2], *pairs))
    if lengths is not None:
        # At least one key, because without any the kernels give the mean of the values, or NaN.
        lengths = jnp.broadcast_to(jnp.maximum(lengths, 1), call.query.shape[:1])
    out = attend(
        call.query,
        call.key,
        call.value,
        bias=bias,
        scale=call.scale,
        is_causal=split.is_causal,
        local_window_size=split.local_window_size,
        key_value_seq_lengths=lengths,
    )
    return jnp.where(split.has_keys()[..., None, None], out, 0)
