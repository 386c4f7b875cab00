"""Attention against its peers: jax.nn, tokamax, PyTorch's SDPA, FlexAttention; part of ``make bench``.

All give the same output (which is asserted) and take turns. Float32, 8 heads, dim 64. Medians; ratios carry over to
other machines of the kind, milliseconds do not.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokamax  # pyright: ignore[reportMissingTypeStubs]
import torch
from absl.flags import FLAGS
from jax import lax
from rich.console import Console
from rich.table import Table
from timing import compare, verdict
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention as sdpa

import jaxmask
from jaxmask import Causal, Segments, SlidingWindow

HEADS, DIM = 8, 64
Peers = dict[str, Callable[..., Any]]
# Why a peer is left out, as the table says it: FlexAttention has no backward pass on a CPU; a gradient of tokamax at
# 16,384 takes minutes with its turns; the scores of all pairs, as jax.nn has them, take 8 GiB there.
NO_GRADIENT, SLOW_GRADIENT, ALL_PAIRS = "no CPU backward", "takes minutes", "all pairs"
compiled_flex = torch.compile(flex_attention, dynamic=False)


def arrays(batch: int, query_length: int, key_length: int, count: int = 4) -> list[jax.Array]:
    """A query, a key, a value and a cotangent."""
    rng = np.random.default_rng(0)
    lengths = [query_length, key_length, key_length, query_length][:count]
    return [jnp.asarray(rng.standard_normal((batch, length, HEADS, DIM), np.float32)) for length in lengths]


def to_torch(x: jax.Array) -> torch.Tensor:
    """The same numbers as ``[batch, heads, length, dim]``, in memory as JAX has them."""
    return torch.from_numpy(np.array(x)).transpose(1, 2)  # pyright: ignore[reportUnknownMemberType]


def packed(length: int, documents: int) -> np.ndarray[Any, Any]:
    """The ids of documents of random lengths, ``[1, length]``."""
    ends = np.sort(np.random.default_rng(1).choice(np.arange(1, length), documents - 1, replace=False))
    return np.searchsorted(ends, np.arange(length), side="right").astype(np.int32)[None]


def in_turn(length: int, peers: Peers, torch_peers: Peers, rounds: int, gradients: bool) -> dict[str, float]:
    """The median seconds of each, of the output or of the output and the gradients of query, key and value."""
    inputs = arrays(1, length, length)
    tensors = [to_torch(x) for x in inputs]
    runs: dict[str, Callable[[], Any]] = {}
    for name, peer in peers.items():

        def both(query: Any, key: Any, value: Any, cotangent: Any, peer: Callable[..., Any] = peer) -> Any:
            output, pull_back = jax.vjp(peer, query, key, value)
            return output, pull_back(cotangent)

        runs[name] = partial(jax.jit(both), *inputs) if gradients else partial(jax.jit(peer), *inputs[:3])
    for name, peer in torch_peers.items():

        def both_torch(peer: Callable[..., Any] = peer) -> Any:
            leaves = [tensor.detach().requires_grad_() for tensor in tensors[:3]]
            output = peer(*leaves)
            return output, torch.autograd.grad(output, leaves, tensors[3])

        runs[name] = both_torch if gradients else partial(peer, *tensors[:3])
    expected = next(iter(runs.values()))()
    for name, run in runs.items():
        for ours, theirs in zip(jax.tree.leaves(expected), jax.tree.leaves(run()), strict=True):
            found = theirs.detach().transpose(1, 2).numpy() if isinstance(theirs, torch.Tensor) else theirs
            np.testing.assert_allclose(found, ours, atol=1e-4, err_msg=name)
    return dict(zip(runs, compare(*runs.values(), warm_up=0, rounds=rounds), strict=True))


def jax_nn(**how: Any) -> Callable[..., Any]:
    """``jax.nn``, by XLA."""
    return partial(jax.nn.dot_product_attention, implementation="xla", **how)


def chunked(**how: Any) -> Callable[..., Any]:
    """Tokamax, the implementation of its own that runs on a CPU in O(length) memory."""
    return partial(tokamax.dot_product_attention, implementation="xla_chunked", **how)


def flex(mask_mod: Callable[..., Any], length: int) -> Callable[..., Any]:
    """FlexAttention compiled; making its block mask is not counted."""
    block_mask = create_block_mask(mask_mod, 1, 1, length, length, "cpu")
    return partial(compiled_flex, block_mask=block_mask)


def ours(mask: jaxmask.Mask) -> Callable[..., Any]:
    """This library, as it chooses."""
    return lambda query, key, value: jaxmask.attention(query, key, value, mask)


def dense(mask: jaxmask.Mask, length: int) -> torch.Tensor:
    """The mask written out, for SDPA."""
    return torch.from_numpy(np.array(mask.dense(length, length)))  # pyright: ignore[reportUnknownMemberType]


def works() -> dict[str, tuple[int, Peers, Peers, dict[str, float]]]:
    """Each work: its length, its peers in JAX and in PyTorch, and the floors of the output against some of them."""
    ids = packed(8192, 32)
    torch_ids = torch.from_numpy(ids[0])  # pyright: ignore[reportUnknownMemberType]

    def causal(b: Any, h: Any, q: Any, kv: Any) -> Any:
        return kv <= q

    def window(size: int) -> Callable[..., Any]:
        return lambda b, h, q, kv: (kv <= q) & (q - kv < size)

    def documents(b: Any, h: Any, q: Any, kv: Any) -> Any:
        return (kv <= q) & (torch_ids[q] == torch_ids[kv])

    packed_causal = Causal() & Segments(ids)
    return {
        "causal, 4,096": (
            4096,
            {"jaxmask": ours(Causal()), "jax.nn": jax_nn(is_causal=True), "tokamax": chunked(is_causal=True)},
            {"SDPA": partial(sdpa, is_causal=True), "Flex": flex(causal, 4096)},
            {"SDPA": 1.3, "jax.nn": 5},
        ),
        "window 512, 8,192": (
            8192,
            {
                "jaxmask": ours(SlidingWindow(512)),
                "jax.nn": jax_nn(is_causal=True, local_window_size=(511, 0)),
                "tokamax": chunked(is_causal=True, local_window_size=(511, 0)),
            },
            {"SDPA": partial(sdpa, attn_mask=dense(SlidingWindow(512), 8192)), "Flex": flex(window(512), 8192)},
            {"Flex": 1.3, "jax.nn": 30, "tokamax": 10},
        ),
        "window 1,024, 16,384": (
            16384,
            {"jaxmask": ours(SlidingWindow(1024)), "tokamax": chunked(is_causal=True, local_window_size=(1023, 0))},
            {
                "SDPA": partial(sdpa, attn_mask=dense(SlidingWindow(1024), 16384)),
                "Flex": flex(window(1024), 16384),
            },
            {"Flex": 1.3},
        ),
        "32 documents, 8,192": (
            8192,
            {
                "jaxmask": ours(Causal() & Segments(jnp.asarray(ids))),
                "tokamax": chunked(mask=packed_causal.dense(8192, 8192)),
            },
            {"SDPA": partial(sdpa, attn_mask=dense(packed_causal, 8192)), "Flex": flex(documents, 8192)},
            {"Flex": 1.3},
        ),
    }


def products(length: int, queries: int, keys: int, first: Callable[[Any], Any], count: Callable[[Any], Any]) -> Any:
    """The two matrix products alone, of the tiles that attention looks at; nothing between them."""

    def run(query: Any, key: Any, value: Any) -> Any:
        query, key, value = query.transpose(0, 2, 1, 3), key.transpose(0, 2, 3, 1), value.transpose(0, 2, 1, 3)

        def tile(i: Any) -> Any:
            rows = lax.dynamic_slice_in_dim(query, i * queries, queries, 2)

            def step(j: Any, total: Any) -> Any:
                start = jnp.minimum(first(i) + j * keys, length - keys)
                scores = jnp.einsum("bhqd,bhdk->bhqk", rows, lax.dynamic_slice_in_dim(key, start, keys, 3))
                return total + jnp.einsum("bhqk,bhkd->bhqd", scores, lax.dynamic_slice_in_dim(value, start, keys, 2))

            return lax.fori_loop(0, count(i), step, jnp.zeros_like(rows))

        return lax.map(tile, jnp.arange(length // queries))

    return jax.jit(run)


def throughput() -> dict[str, float]:
    """The part of the time of attention that its matrix products alone take."""
    causal, window = arrays(1, 4096, 4096, 3), arrays(1, 8192, 8192, 3)
    alone = (
        products(4096, 256, 512, lambda i: 0, lambda i: (i + 2) // 2),
        products(8192, 256, 768, lambda i: jnp.maximum(i * 256 - 512, 0), lambda i: 1),
    )
    times = compare(
        *(partial(jax.jit(ours(Causal())), *causal), partial(jax.jit(ours(SlidingWindow(512))), *window)),
        *(partial(alone[0], *causal), partial(alone[1], *window)),
        rounds=9,
    )
    return {"causal, 4,096": times[2] / times[0], "window 512, 8,192": times[3] / times[1]}


def decode() -> tuple[float, float]:
    """A step with 8 rows and a cache of 8,192 keys: all of them live, and jax.nn, against 512 live ones."""
    inputs = arrays(8, 1, 8192, 3)
    step = jax.jit(lambda query, key, value, offset: jaxmask.attention(query, key, value, Causal(), offset=offset))
    peer = jax.jit(lambda query, key, value, lengths: jax_nn(key_value_seq_lengths=lengths)(query, key, value))
    runs = (
        *(partial(step, *inputs, jnp.int32(position)) for position in (511, 8191)),
        partial(peer, *inputs, jnp.full(8, 512, jnp.int32)),
    )
    np.testing.assert_allclose(runs[0](), runs[2](), atol=1e-5)
    live, full, theirs = compare(*runs)
    return full / live, theirs / live


def long_context() -> float:
    """131,072 tokens, window 1,024, output and gradients: runs; peak memory over the size of q + k + v + out."""
    inputs = arrays(1, 131_072, 131_072)

    def both(query: Any, key: Any, value: Any, cotangent: Any) -> Any:
        output, pull_back = jax.vjp(ours(SlidingWindow(1024)), query, key, value)
        return output, pull_back(cotangent)

    compiled = jax.jit(both).lower(*inputs).compile()
    jax.block_until_ready(compiled(*inputs))
    memory: Any = compiled.memory_analysis()
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return peak / (4 * inputs[0].nbytes)


def main() -> None:
    """Compare, print, and say which floors are met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the ratios there")
    parser.add_argument("--only", default="", metavar="TEXT", help="only the work whose name begins so")
    parser.add_argument("--rounds", type=int, default=7, help="how often each takes its turn")
    options = parser.parse_args()
    FLAGS.mark_as_parsed()  # tokamax would read the command line
    console = Console(width=100)
    table = Table(title="attention, float32, 8 heads, dim 64: medians")
    for column in ("work", "who", "output ms", "x jaxmask", "with gradients ms", "x jaxmask"):
        table.add_column(column, justify="left" if column in ("work", "who") else "right", no_wrap=True)
    ratios: dict[str, float] = {}

    def judge(what: str, ratio: float, floor: float) -> None:
        ratios[what] = ratio
        console.print(verdict(what, ratio, floor), highlight=False)

    for work, (length, peers, torch_peers, floors) in works().items():
        if not work.startswith(options.only):
            continue
        output = in_turn(length, peers, torch_peers, options.rounds, gradients=False)
        left_out = {"Flex": NO_GRADIENT} | ({"tokamax": SLOW_GRADIENT} if length > 8192 else {})
        jax_too, torch_too = (
            {name: peer for name, peer in some.items() if name not in left_out} for some in (peers, torch_peers)
        )
        both = in_turn(length, jax_too, torch_too, max(options.rounds // 3, 1), gradients=True)
        for name, seconds in output.items():
            cells = [f"{1e3 * seconds:,.0f}", f"{seconds / output['jaxmask']:.2f}"]
            if name in both:
                cells += [f"{1e3 * both[name]:,.0f}", f"{both[name] / both['jaxmask']:.2f}"]
            else:
                cells += [left_out[name], ""]
            table.add_row(work if name == "jaxmask" else "", name, *cells)
        if "jax.nn" not in output:
            table.add_row("", "jax.nn", ALL_PAIRS, "", ALL_PAIRS, "")
        for name, floor in floors.items():
            judge(f"{work}, against {name}", output[name] / output["jaxmask"], floor)
        if len(both) > 1:
            name = min((name for name in both if name != "jaxmask"), key=both.__getitem__)
            judge(f"{work}, with gradients, against {name}", both[name] / both["jaxmask"], 1.2)
    for work, part in throughput().items():
        judge(f"{work}, speed of the two matrix products alone", part, 0.55)
    full, theirs = decode()
    judge("decoding, 8 rows, 512 keys live of 8,192: against all live", full, 4)
    judge("decoding, 8 rows, 512 keys live of 8,192: against jax.nn", theirs, 4)
    ratios["131,072 tokens: peak memory over q + k + v + out"] = peak = long_context()
    console.print(
        f"131,072 tokens, window 1,024, with gradients: {peak:.2f} times the size of q + k + v + out, at most 6: "
        + ("met" if peak <= 6 else "missed"),
        highlight=False,
    )
    console.print(table)
    if options.json is not None:
        options.json.write_text(json.dumps(ratios, indent=2) + "\n")


if __name__ == "__main__":
    main()
