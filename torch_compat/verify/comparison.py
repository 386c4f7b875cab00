"""Cases called in JAX and in PyTorch, and their results compared: bit for bit, but for attention.

jaxmask is called by Transformers' own names and signatures (:mod:`jaxmask.hf`). So the same call, with its arrays in
either framework, runs on every side.
"""

import warnings
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask
from transformers import masking_utils as transformers_masking_utils

from jaxmask import TileMap
from jaxmask.hf import masking_utils as jax_masking_utils
from jaxmask.hf import modeling_attn_mask_utils as jax_masks
from torch_compat import reference
from torch_compat.blocks import to_block_mask
from torch_compat.bridge import bits, to_torch
from torch_compat.verify import attention, attention_cases, converter_cases, masking_cases
from torch_compat.verify.attention_cases import AttentionCall
from torch_compat.verify.cases import DTYPES, Case, Side

# The modules that say what modeling_attn_mask_utils means. Transformers has it no longer since 5.24.
ORACLES: dict[str, Any] = {"reference": reference}
if find_spec("transformers.modeling_attn_mask_utils") is not None:
    ORACLES["transformers"] = import_module("transformers.modeling_attn_mask_utils")
# What Transformers has no longer, the reference has.
_MASKING_UTILS = SimpleNamespace(**{**vars(reference), **vars(transformers_masking_utils)})


def oracles_of(operation: str) -> tuple[str, ...]:
    """The oracles that an operation can be compared with."""
    if operation in attention.OPERATIONS:
        return tuple(attention.ORACLES)
    if operation in converter_cases.OPERATIONS:
        return tuple(ORACLES)
    return ("transformers",) if hasattr(transformers_masking_utils, operation) else ("reference",)


@dataclass
class Row:
    """What an operation did in one dtype against one oracle. Attention within the tolerance counts as equal.

    ``known`` is the number of cases in which the installed Transformers is known to differ. They are not in ``cases``.
    """

    operation: str
    dtype: str
    oracle: str
    cases: int = 0
    equal: int = 0
    known: int = 0
    first_difference: dict[str, str] | None = None


def compare_operation(operation: str, dtype: str, oracles: Sequence[str], cases: int, seed: int) -> list[Row]:
    """A row for each of the oracles that the operation has, over the same generated cases."""
    rows = [Row(operation, dtype, oracle) for oracle in oracles if oracle in oracles_of(operation)]
    with precision(dtype):
        for case in generate(operation, dtype, cases, seed):
            ours: Any = attention.call_jax(operation, case) if isinstance(case, AttentionCall) else call_jax(case)
            for row in rows:
                if row.oracle in case.unanswered:
                    continue
                if row.oracle == "transformers" and case.known_difference:
                    row.known += 1
                    continue
                if isinstance(case, AttentionCall):
                    difference = attention.compare(row.oracle, case, ours, operation)
                else:
                    difference = compare(ours, call_torch(row.oracle, case))
                row.cases += 1
                row.equal += difference is None
                if difference is not None and row.first_difference is None:
                    row.first_difference = {"inputs": case.describe(), "difference": difference}
    return rows


def generate(operation: str, dtype: str, count: int, seed: int) -> Iterable[Case | AttentionCall]:
    """``count`` cases of an operation, or the one case of long attention; none in a dtype that it has not.

    The same seed makes the same cases.
    """
    if operation == attention.LONG:
        return attention_cases.generate_long(dtype, seed)
    if operation == attention.PALLAS and dtype == "float64":
        return ()
    if operation in attention.OPERATIONS:
        return attention_cases.generate(dtype, count, seed)
    module = converter_cases if operation in converter_cases.OPERATIONS else masking_cases
    return module.generate(operation, dtype, count, seed)


def jax_side(dtype: str, array: Callable[[np.ndarray], Any] = jnp.asarray) -> Side:
    """The side on which a case is called in JAX."""
    return Side(jax_masks, jax_masking_utils, array, jnp.zeros, jnp.dtype(DTYPES[dtype]), is_torch=False)


def torch_side(oracle: str, dtype: str) -> Side:
    """The side on which a case is called in PyTorch."""

    def zeros(shape: tuple[int, ...], dtype: Any) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    return Side(ORACLES.get(oracle), _MASKING_UTILS, _tensor, zeros, getattr(torch, dtype), is_torch=True)


def call_jax(case: Case) -> object:
    """The case's result in JAX, or the exception."""
    return _call(jax_side(case.dtype, np.asarray if case.is_numpy else jnp.asarray), case)


def call_torch(oracle: str, case: Case) -> object:
    """The case's result in PyTorch, or the exception."""
    result = _call(torch_side(oracle, case.dtype), case)
    # PyTorch counts in int64, which JAX has in 64-bit mode only.
    is_index = isinstance(result, torch.Tensor) and result.dtype == torch.int64 and case.module == "masking_utils"
    return result.to(torch.int32) if is_index and case.dtype != "float64" else result


def _call(side: Side, case: Case) -> Any:
    try:
        arguments = {name: side.value(argument) for name, argument in case.arguments.items()}
        if case.needs_dtype:
            arguments["dtype"] = side.dtype
        *owner, name = case.operation.split(".")
        target: Any = getattr(side, case.module)
        target = getattr(target, owner[0]) if owner else target
        if case.converter is not None:
            target = target(*case.converter)
        result = getattr(target, name)(*map(side.value, case.positional), **arguments)
        return result if case.grid is None else _at_pairs(side, result, case.grid)
    except Exception as error:
        return error


def _at_pairs(side: Side, result: Any, grid: dict[str, np.ndarray]) -> Any:
    """A mask function, or its result, as one bool for each pair."""
    indices = [side.value(index) for index in grid.values()]
    allowed: Any = result(*indices) if callable(result) else result
    shape = np.broadcast_shapes(*(index.shape for index in grid.values()))
    return (torch if side.is_torch else jnp).broadcast_to(allowed, shape)


def _tensor(array: np.ndarray) -> torch.Tensor:
    if array.dtype.kind != "V":
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)


def compare(ours: object, theirs: object) -> str | None:
    """The first difference of two results in words: of type, shape, dtype or any bit. ``None`` where there is none."""
    if isinstance(ours, Exception) or isinstance(theirs, Exception):
        # A TypeError on both sides is no agreement: neither side understands the call.
        return (
            None
            if not isinstance(ours, TypeError) and _error_kind(ours) == _error_kind(theirs)
            else f"ours {ours!r}, theirs {theirs!r}"
        )
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return _compare_each(ours, theirs)
    if isinstance(ours, TileMap) and isinstance(theirs, BlockMask):
        return _compare_each(parts(to_block_mask(ours)), parts(theirs))
    if isinstance(ours, np.ndarray):
        ours = jnp.asarray(ours)  # a mask that was handed back
    if not isinstance(ours, jax.Array | torch.Tensor) or not isinstance(theirs, torch.Tensor):
        return None if type(ours) is type(theirs) and ours == theirs else f"ours {ours!r}, theirs {theirs!r}"
    converted = to_torch(ours) if isinstance(ours, jax.Array) else ours
    if converted.dtype != theirs.dtype or converted.shape != theirs.shape:
        return f"ours {converted.dtype}{list(converted.shape)}, theirs {theirs.dtype}{list(theirs.shape)}"
    differs = (bits(converted) != bits(theirs)).nonzero()
    if len(differs) == 0:
        return None
    index = tuple(differs[0].tolist())
    return f"{len(differs)} elements, the first at {index}: ours {converted[index]!r}, theirs {theirs[index]!r}"


def _compare_each(ours: dict[str, Any], theirs: dict[str, Any]) -> str | None:
    if ours.keys() != theirs.keys():
        return f"ours {sorted(ours)}, theirs {sorted(theirs)}"
    differences = ((name, compare(ours[name], theirs[name])) for name in ours)
    return next((f"{name}: {difference}" for name, difference in differences if difference is not None), None)


def parts(mask: BlockMask) -> dict[str, Any]:
    """All parts of a ``BlockMask``, and what its function says for every pair."""
    names = [
        f"{full}{axis}_{what}" for full in ("", "full_") for axis in ("kv", "q") for what in ("num_blocks", "indices")
    ]
    parts = {name: getattr(mask, name) for name in (*names, "seq_lengths", "BLOCK_SIZE")}
    return parts | {"mask_mod": create_mask(mask.mask_mod, *mask.shape, device="cpu")}


def _error_kind(value: object) -> type[Exception] | None:
    """An exception's type. Where PyTorch fails deep inside an operation, jaxmask refuses an argument."""
    if not isinstance(value, Exception):
        return None
    is_inside = isinstance(value, RuntimeError | IndexError) and not isinstance(value, NotImplementedError)
    return ValueError if is_inside else type(value)


@contextmanager
def precision(dtype: str) -> Generator[None]:
    """Set float64 up as its users do: by 64-bit mode in JAX, by the default dtype in PyTorch, which Transformers reads.

    Block masks are made without the compiler, which for each of them takes longer than everything else.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if dtype == "float64" else default)
    setattr(transformers_masking_utils, "create_block_mask", _block_mask_without_compiler)  # noqa: B010
    try:
        with jax.enable_x64(dtype == "float64"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The attention mask API under", FutureWarning)
            yield
    finally:
        torch.set_default_dtype(default)
        setattr(transformers_masking_utils, "create_block_mask", create_block_mask)  # noqa: B010


def _block_mask_without_compiler(*arguments: Any, _compile: bool, **more: Any) -> BlockMask:
    return create_block_mask(*arguments, **more)
