"""Attention and its gradients by their definition: NumPy, float64, every score written out. An oracle."""

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


def defined(
    allowed: Bools,
    cotangent: Any,
    *,
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    sinks: Any = None,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    lse_cotangent: Any = None,
    dropout: Any = 1.0,
) -> tuple[dict[str, Floats], dict[str, float]]:
    """The output, the log-sum-exp, and the gradient for each array, by name; and the scale of each.

    ``dropout`` is what each weight is multiplied by after softmax.

    The scale is the largest sum of the absolute values of all that is added up for one element: a gradient may be next
    to nothing for terms that cancel, and rounding errors follow the terms.
    """
    query, key, value, cotangent = (np.asarray(x, np.float64) for x in (query, key, value, cotangent))
    heads, kv_heads = query.shape[2], key.shape[2]
    group = heads // kv_heads
    k, v = (np.repeat(x, group, axis=2) for x in (key, value))
    scale = query.shape[3] ** -0.5 if scale is None else scale
    scores = np.einsum("bqhd,bkhd->bhqk", query, k) * scale
    slope = np.ones_like(scores)
    if logits_soft_cap is not None:
        capped = np.tanh(scores / logits_soft_cap)
        scores, slope = logits_soft_cap * capped, 1 - capped**2
    if bias is not None:
        scores = scores + np.asarray(bias, np.float64)
    # A sink is a score without a value, so that a row with a sink is never empty.
    sink = np.full(heads, -np.inf) if sinks is None else np.asarray(sinks, np.float64)
    sink = np.broadcast_to(sink[:, None, None], (*scores.shape[:3], 1))
    scores = np.where(np.broadcast_to(allowed, scores.shape), scores, -np.inf)
    highest = np.maximum(scores.max(-1, keepdims=True), sink)
    highest = np.where(np.isfinite(highest), highest, 0)
    total = np.exp(scores - highest).sum(-1, keepdims=True) + np.exp(sink - highest)
    there = total > 0
    lse = np.where(there, highest + np.log(np.where(there, total, 1)), -np.inf)
    some_lse = np.where(there, lse, 0)
    weights, sink_weights = np.exp(scores - some_lse), np.exp(sink - some_lse)

    dlse = np.zeros(query.shape[:3]) if lse_cotangent is None else np.asarray(lse_cotangent, np.float64)
    dlse = np.where(there, np.moveaxis(dlse, 2, 1)[..., None], 0)
    kept = weights * dropout
    dweights = np.einsum("bqhd,bkhd->bhqk", cotangent, v) * dropout
    mean = (weights * dweights).sum(-1, keepdims=True)
    dscores = weights * (dweights - mean + dlse)
    most = weights * (np.abs(dweights) + np.abs(weights * dweights).sum(-1, keepdims=True) + np.abs(dlse))

    def of_query(dscores: Floats, k: Floats) -> Floats:
        return np.einsum("bhqk,bkhd->bqhd", dscores * slope, k) * scale

    def of_key(dscores: Floats, query: Floats) -> Floats:
        return _by_kv_head(np.einsum("bhqk,bqhd->bkhd", dscores * slope, query) * scale, group)

    def of_value(weights: Floats, cotangent: Floats) -> Floats:
        return _by_kv_head(np.einsum("bhqk,bqhd->bkhd", weights, cotangent), group)

    found = {
        "out": np.einsum("bhqk,bkhd->bqhd", kept, v),
        "lse": np.moveaxis(lse[..., 0], 1, 2),
        "query": of_query(dscores, k),
        "key": of_key(dscores, query),
        "value": of_value(kept, cotangent),
    }
    terms = {
        "out": np.abs(value) * np.max(dropout),
        "lse": np.abs(some_lse) + 1,
        "query": np.abs(of_query(most, np.abs(k))),
        "key": np.abs(of_key(most, np.abs(query))),
        "value": of_value(kept, np.abs(cotangent)),
    }
    if bias is not None:
        found["bias"], terms["bias"] = (_sum_to(x, np.shape(bias)) for x in (dscores, most))
    if sinks is not None:
        found["sinks"] = (sink_weights * (dlse - mean)).sum((0, 2, 3))
        terms["sinks"] = (sink_weights * (np.abs(dlse) + np.abs(weights * dweights).sum(-1, keepdims=True))).sum(
            (0, 2, 3)
        )
    return found, {name: float(x.max()) for name, x in terms.items()}


def _by_kv_head(x: Floats, group: int) -> Floats:
    return x.reshape(*x.shape[:2], -1, group, x.shape[3]).sum(3)


def _sum_to(x: Floats, shape: tuple[int, ...]) -> Floats:
    """The sum over the axes that a broadcast from ``shape`` made."""
    whole = (1,) * (x.ndim - len(shape)) + shape
    return x.sum(tuple(axis for axis, size in enumerate(whole) if size == 1), keepdims=True).reshape(shape)


def errors(found: dict[str, Any], expected: dict[str, Floats], scales: dict[str, float]) -> dict[str, float]:
    """For each array that was found, the largest error relative to its scale."""
    return {
        name: float(_distance(np.asarray(x, np.float64), expected[name]).max())
        / (scales[name] or np.finfo(np.float64).tiny)
        for name, x in found.items()
    }


def _distance(x: Floats, expected: Floats) -> Floats:
    assert x.shape == expected.shape
    assert not np.isnan(x).any()
    with np.errstate(invalid="ignore"):
        return np.where(x == expected, 0, np.abs(x - expected))  # infinities are equal or far apart


def assert_close(found: dict[str, Any], expected: tuple[dict[str, Floats], dict[str, float]], tolerance: float) -> None:
    """Every array is what is expected, up to a tolerance relative to its scale."""
    far = {name: error for name, error in errors(found, *expected).items() if not error <= tolerance}
    assert far == {}
