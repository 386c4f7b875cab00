"""Who takes part in ``benchmarks/gpu.py``: masks, as each side says them, and what is run for them."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxmask
from jaxmask import Causal, Mask, PerHead, Predicate, Prefix, Segments, SlidingWindow, zoo

OUTPUT, GRADIENTS = "output", "with gradients"
IN_JAX, IN_TORCH = ("pallas", "blocked", "cudnn", "tokamax", "jax.nn"), ("Flex", "SDPA")
Shape = tuple[int, int, int, int]  # [batch, length, heads, dim]
Run = Callable[[], list[Any]]


class Work(NamedTuple):
    """A mask, as each side says it.

    Args:
        mask: for this library.
        native: arguments of ``jax.nn`` and tokamax; none where they get it written out.
        allows: for FlexAttention, a function of ``b, h, q, kv`` and the ids of documents.
    """

    mask: Mask
    native: dict[str, Any]
    allows: Callable[..., Any]


class Contestant(NamedTuple):
    """What can be run.

    Args:
        runs: the output alone, and with the gradients of query, key and value.
        inputs: query, key, value and cotangent.
        to_numpy: takes the first example of one, or of a result, as float32 ``[1, length, heads, dim]``.
        device: the name of the card.
        is_written_out: whether the mask is.
        seconds: of a call, of several in a row, by the clock of the card; ``None`` where it has none.
    """

    runs: dict[str, Run]
    inputs: list[Any]
    to_numpy: Callable[[Any], Any]
    device: str
    is_written_out: bool
    seconds: Callable[[Run, int], float] | None = None


def documents(length: int) -> Any:
    """The ids of documents of random lengths, ``[length]``."""
    return (np.random.default_rng(1).random(length) < 1 / usual(length)).cumsum(dtype=np.int32)


def usual(length: int) -> int:
    """The size of a window, and the mean of a document: 1,024, but where there are few tokens."""
    return min(1024, length // 2)


def works(length: int, heads: int) -> dict[str, Work]:
    """Each mask."""
    size, prefix, sinks = usual(length), length // 4, 4

    def dilated(b: Any, h: Any, q: Any, kv: Any) -> Any:
        return (q - kv < size) | ((q - kv) % 4 == 0)

    return {
        "causal": Work(Causal(), {"is_causal": True}, lambda b, h, q, kv, ids: kv <= q),
        "window": Work(
            SlidingWindow(size),
            {"is_causal": True, "local_window_size": (size - 1, 0)},
            lambda b, h, q, kv, ids: (kv <= q) & (q - kv < size),
        ),
        "documents": Work(
            Causal() & Segments(documents(length)[None]), {}, lambda b, h, q, kv, ids: (kv <= q) & (ids[q] == ids[kv])
        ),
        "prefix-LM": Work(Causal() | Prefix(prefix), {}, lambda b, h, q, kv, ids: (kv <= q) | (kv < prefix)),
        "sinks and window": Work(
            zoo.streaming_llm(sinks, size), {}, lambda b, h, q, kv, ids: (kv <= q) & ((q - kv < size) | (kv < sinks))
        ),
        "per head": Work(
            PerHead([Causal() if h % 2 else SlidingWindow(size) for h in range(heads)]),
            {},
            lambda b, h, q, kv, ids: (kv <= q) & ((q - kv < size) | (h % 2 == 1)),
        ),
        "user's predicate": Work(
            Causal() & Predicate(dilated), {}, lambda b, h, q, kv, ids: (kv <= q) & dilated(b, h, q, kv)
        ),
    }


@jax.jit
def defined(mask: Mask, cotangent: Any, *inputs: Any) -> list[Any]:
    """The output and the gradients, from all scores in float32."""
    out, pull_back = jax.vjp(partial(jaxmask.attention, mask=mask, implementation="xla"), *inputs)
    return [out, *pull_back(cotangent)]


def assert_defined(contestant: Contestant, found: list[Any], mask: Mask) -> None:
    """What is found for the first example is what is defined: the output, and the gradients if there are any."""
    *inputs, cotangent = map(contestant.to_numpy, contestant.inputs)
    for x, expected in zip(map(contestant.to_numpy, found), defined(mask, cotangent, *inputs), strict=False):
        error = np.linalg.norm(x - expected) / np.linalg.norm(expected)
        # Bfloat16 has 8 bits, and a wrong mask is further away than that by far.
        assert error < 0.02, f"it is {error:.1%} away from what is defined"


def several(run: Run, calls: int) -> list[Any]:
    """The last of several results; the others are let go."""
    for _ in range(calls - 1):
        run()
    return run()


def normal(shape: Shape, dtype: Any) -> list[jax.Array]:
    """A query, a key, a value and a cotangent."""
    return [jax.random.normal(key, shape, dtype) for key in jax.random.split(jax.random.key(0), 4)]


def in_jax(who: str, work: Work, shape: Shape, device: str) -> Contestant:
    """One of those in JAX, on ``cuda`` or ``cpu``. The mask is an argument, so that its arrays are traced."""
    if device == "cuda" and jax.default_backend() != "gpu":
        raise RuntimeError("this JAX finds no GPU")
    length, is_written_out = shape[1], False
    if who in ("pallas", "blocked"):
        attend: Callable[..., Any] = partial(jaxmask.attention, implementation=who)
        mask: Any = jax.device_put(work.mask)
    else:
        is_written_out = not work.native
        mask = jax.jit(lambda mask: mask.dense(length, length))(work.mask) if is_written_out else None
        attend = _native(who, work.native)

    @jax.jit
    def output(mask: Any, *inputs: Any) -> list[Any]:
        return [attend(*inputs, mask=mask)]

    @jax.jit
    def with_gradients(mask: Any, cotangent: Any, *inputs: Any) -> list[Any]:
        out, pull_back = jax.vjp(lambda *inputs: attend(*inputs, mask=mask), *inputs)
        return [out, *pull_back(cotangent)]

    *inputs, cotangent = normal(shape, jnp.bfloat16)
    return Contestant(
        {OUTPUT: partial(output, mask, *inputs), GRADIENTS: partial(with_gradients, mask, cotangent, *inputs)},
        [*inputs, cotangent],
        lambda x: np.asarray(x[:1], np.float32),
        jax.devices()[0].device_kind,
        is_written_out,
    )


def _native(who: str, native: dict[str, Any]) -> Callable[..., Any]:
    """A peer in JAX, which takes a written mask where its own arguments do not say it."""
    if who != "tokamax":
        implementation: Any = "cudnn" if who == "cudnn" else "xla"
        return partial(jax.nn.dot_product_attention, implementation=implementation, **native)
    import tokamax  # pyright: ignore[reportMissingTypeStubs]
    from absl.flags import FLAGS

    FLAGS.mark_as_parsed()  # tokamax would read the command line
    # Its kernels, and for what they do not take its loop in O(length) memory.
    return partial(tokamax.dot_product_attention, implementation=("mosaic", "triton", "xla_chunked"), **native)


def in_torch(who: str, work: Work, shape: Shape, device: str) -> Contestant:
    """One of those in PyTorch, whose arrays are ``[batch, heads, length, dim]``, on ``cuda`` or ``cpu``."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention
    from torch.nn.functional import scaled_dot_product_attention

    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("this PyTorch finds no CUDA")
    batch, length, heads, dim = shape
    ids = torch.from_numpy(documents(length)).to(device)

    def allows(b: Any, h: Any, q: Any, kv: Any) -> Any:
        return work.allows(b, h, q, kv, ids)

    def compiled(function: Any) -> Any:
        # To compile for a CPU takes minutes, and gives no gradient.
        return torch.compile(function, fullgraph=True, dynamic=False) if device == "cuda" else function

    torch.compiler.reset()  # else it gives up compiling after a few lengths
    is_written_out = who == "SDPA" and work.native != {"is_causal": True}
    of_mask = None, heads if work.mask.shape[1] > 1 else None, length, length, device
    if who == "Flex":
        attend: Any = partial(compiled(flex_attention), block_mask=compiled(create_block_mask)(allows, *of_mask))
    elif is_written_out:
        attend = partial(scaled_dot_product_attention, attn_mask=compiled(create_mask)(allows, *of_mask))
    else:
        attend = partial(scaled_dot_product_attention, is_causal=True)
    torch.manual_seed(0)
    of_tensor: Any = {"dtype": torch.bfloat16, "device": device}
    *inputs, cotangent = (torch.randn(batch, heads, length, dim, **of_tensor) for _ in range(4))
    leaves = [x.detach().requires_grad_() for x in inputs]

    def output() -> list[Any]:
        with torch.no_grad():
            return [attend(*inputs)]

    def with_gradients() -> list[Any]:
        out = attend(*leaves)
        return [out, *torch.autograd.grad(out, leaves, cotangent)]

    def by_events(run: Run, calls: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        several(run, calls)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / calls

    return Contestant(
        {OUTPUT: output, GRADIENTS: with_gradients},
        [*inputs, cotangent],
        lambda x: x[:1].detach().float().cpu().transpose(1, 2).numpy(),
        torch.cuda.get_device_name() if device == "cuda" else device,
        is_written_out,
        by_events if device == "cuda" else None,
    )
