"""Run jaxmask and PyTorch on the same inputs, compare bit for bit (attention: within a tolerance), and report.

jaxmask is called by Transformers' own names and signatures (:mod:`jaxmask.hf`), so that one call, with its arrays in
either framework, runs on every side.
"""

import json
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask
from transformers import masking_utils as transformers_masking_utils
from transformers import modeling_attn_mask_utils as transformers_masks

from jaxmask import TileMap
from jaxmask.hf import masking_utils as jax_masking_utils
from jaxmask.hf import modeling_attn_mask_utils as jax_masks
from torch_compat import (
    attention,
    attention_cases,
    masking_cases,
    minilm,
    real_models,
    reference,
    smollm2,
    tiny_models,
)
from torch_compat import cases as older_cases
from torch_compat.blocks import to_block_mask
from torch_compat.bridge import bits, to_torch
from torch_compat.cases import DTYPES, Case, Side, minilm_folder

ORACLES: dict[str, ModuleType] = {"reference": reference, "transformers": transformers_masks}
OPERATIONS = (*older_cases.OPERATIONS, *masking_cases.OPERATIONS)
ALL_OPERATIONS = (*OPERATIONS, *attention.OPERATIONS)
ALL_ORACLES = (*ORACLES, *attention.ORACLES)
DEFAULT_CASES, DEFAULT_ATTENTION_CASES = 120, 12
ModelCheck = minilm.ModelCheck | tiny_models.ModelCheck | real_models.EmbeddingsCheck | smollm2.GenerationCheck
MODELS: tuple[Callable[[], ModelCheck], ...] = (
    partial(minilm.check, "eager"),
    partial(minilm.check, "sdpa"),
    *(partial(tiny_models.check, name) for name in tiny_models.MODELS),
    real_models.compare_minilm,
    smollm2.compare,
)


@dataclass
class Row:
    """What one operation did in one dtype against one oracle. Attention within the tolerance counts as equal."""

    operation: str
    dtype: str
    oracle: str
    cases: int = 0
    equal: int = 0
    first_difference: dict[str, Any] | None = None


def compare(ours: object, theirs: object) -> str | None:
    """How two results differ, or ``None`` where they are the same: type, shape, dtype and every bit."""
    if isinstance(ours, Exception) or isinstance(theirs, Exception):
        # A TypeError on both sides would be a call that neither understands, and no agreement.
        return (
            None
            if not isinstance(ours, TypeError) and _error_kind(ours) == _error_kind(theirs)
            else f"ours {ours!r}, theirs {theirs!r}"
        )
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return _compare_each(ours, theirs)
    if isinstance(ours, TileMap) and isinstance(theirs, BlockMask):
        return _compare_each(_parts(to_block_mask(ours)), _parts(theirs))
    if isinstance(ours, np.ndarray):
        ours = jnp.asarray(ours)  # handed back as it came
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


def _parts(mask: BlockMask) -> dict[str, Any]:
    """All of a ``BlockMask``, and what its function says of every pair."""
    names = [
        f"{full}{axis}_{what}" for full in ("", "full_") for axis in ("kv", "q") for what in ("num_blocks", "indices")
    ]
    parts = {name: getattr(mask, name) for name in (*names, "seq_lengths", "BLOCK_SIZE")}
    return parts | {"mask_mod": create_mask(mask.mask_mod, *mask.shape, device="cpu")}


def _error_kind(value: object) -> type[Exception] | None:
    """An exception's type; what PyTorch says of shapes deep inside an operation, jaxmask says of an argument."""
    if not isinstance(value, Exception):
        return None
    return ValueError if isinstance(value, RuntimeError) and not isinstance(value, NotImplementedError) else type(value)


def generate(operation: str, dtype: str, count: int, seed: int) -> Iterator[Case]:
    """``count`` cases of an operation, by its public name; the same for the same seed."""
    return _cases_of(operation).generate(operation, dtype, count, seed)


def _cases_of(operation: str) -> ModuleType:
    return masking_cases if operation in masking_cases.OPERATIONS else older_cases


def oracles_of(operation: str) -> tuple[str, ...]:
    """The oracles that an operation can be compared with."""
    if operation in attention.OPERATIONS:
        return tuple(attention.ORACLES)
    return ("transformers",) if _cases_of(operation) is masking_cases else tuple(ORACLES)


def jax_side(dtype: str, array: Callable[[np.ndarray], Any] = jnp.asarray) -> Side:
    """Where a case is called in JAX."""
    return Side(jax_masks, jax_masking_utils, array, jnp.zeros, jnp.dtype(DTYPES[dtype]), is_torch=False)


def call_jax(case: Case) -> object:
    """The case's result in JAX, or the exception."""
    return _call(jax_side(case.dtype, np.asarray if case.of_numpy else jnp.asarray), case)


def call_torch(oracle: str, case: Case) -> object:
    """The case's result in PyTorch, or the exception."""
    dtype = getattr(torch, case.dtype)
    result = _call(
        Side(
            ORACLES[oracle],
            transformers_masking_utils,
            _tensor,
            lambda shape, dtype: torch.zeros(shape, dtype=dtype),
            dtype,
            True,
        ),
        case,
    )
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
    """A mask function, or what it said, in full: one bool for each pair."""
    indices = [side.value(index) for index in grid.values()]
    allowed: Any = result(*indices) if callable(result) else result
    shape = np.broadcast_shapes(*(index.shape for index in grid.values()))
    return (torch if side.is_torch else jnp).broadcast_to(allowed, shape)


def _tensor(array: np.ndarray) -> torch.Tensor:
    return (
        torch.from_numpy(array)
        if array.dtype.kind != "V"
        else torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    )


@contextmanager
def _precision(dtype: str) -> Generator[None]:
    """float64 as its users set it up: 64-bit mode in JAX, the default dtype in PyTorch (Transformers fills in that).

    And block masks without the compiler, which for each of them costs more than all else.
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


def compare_operation(operation: str, dtype: str, oracles: Sequence[str], cases: int, seed: int) -> list[Row]:
    """One row per oracle over the same generated cases, of the oracles that the operation has."""
    rows = [Row(operation, dtype, oracle) for oracle in oracles if oracle in oracles_of(operation)]
    with _precision(dtype):
        for case in generate(operation, dtype, cases, seed):
            ours = call_jax(case)
            for row in rows:
                if row.oracle == "transformers" and not case.transformers:
                    continue
                _count(row, case, compare(ours, call_torch(row.oracle, case)))
    return rows


def compare_attention(operation: str, dtype: str, oracles: Sequence[str], cases: int, seed: int) -> list[Row]:
    """The same for attention, of one of our implementations."""
    rows = [Row(operation, dtype, oracle) for oracle in oracles if oracle in attention.ORACLES]
    with _precision(dtype):
        is_long = operation == attention.LONG
        made = attention_cases.generate_long(dtype, seed) if is_long else attention_cases.generate(dtype, cases, seed)
        for case in made:
            ours = attention.call_jax(operation, case)
            for row in rows:
                if attention.has_answer(row.oracle, case):
                    _count(row, case, attention.compare(row.oracle, case, ours))
    return rows


def _count(row: Row, case: Case | attention_cases.Case, difference: str | None) -> None:
    row.cases += 1
    row.equal += difference is None
    if difference is not None and row.first_difference is None:
        row.first_difference = {"inputs": case.describe(), "difference": difference}


def run(
    cases: int | None = None,
    seed: int = 0,
    operations: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    oracles: Sequence[str] | None = None,
    report: Path | None = None,
    console: Console | None = None,
) -> int:
    """Compare everything that is asked for, print a table, and return the exit status: 1 on any difference.

    Args:
        cases: number of cases per operation and dtype; unless given, 240, and 12 of attention; of long
            attention there is one.
        seed: of the generated inputs.
        operations, dtypes, oracles: names; all of them unless given. The models are run where all operations are.
        report: a file for the rows as JSON.
        console: where to print.

    Raises:
        ValueError: an unknown name; an operation that none of the oracles has; a number of cases that is not positive.
    """
    if cases is not None and cases < 1:
        raise ValueError(f"cases must be at least 1, got {cases}")
    dtypes = _known("dtype", dtypes, tuple(DTYPES))
    oracles = _known("oracle", oracles, ALL_ORACLES)
    comparable = tuple(operation for operation in ALL_OPERATIONS if set(oracles_of(operation)) & set(oracles))
    for operation in _known("op", operations, ALL_OPERATIONS):
        if operations and operation not in comparable:
            raise ValueError(f"op: {operation!r} is compared with {' and '.join(oracles_of(operation))} alone")
    operations = operations or comparable
    checks = MODELS if operations is comparable else ()
    if checks:  # that weights are missing is said now, and not after minutes
        minilm_folder()
        smollm2.checkpoint()
    console = console or _console()
    rows: list[Row] = []
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("", total=len(operations) * len(dtypes))
        for operation in operations:
            progress.update(task, description=operation)
            is_attention = operation in attention.OPERATIONS
            compare_cases = compare_attention if is_attention else compare_operation
            count = cases or (DEFAULT_ATTENTION_CASES if is_attention else DEFAULT_CASES)
            for dtype in dtypes:
                rows += compare_cases(operation, dtype, oracles, count, seed)
                progress.advance(task)
            if not console.is_terminal:
                total, differences = _totals([row for row in rows if row.operation == operation])
                agree = "within the tolerance" if is_attention else "equal"
                console.print(f"{operation}: {total - differences} of {total} {agree}")
    for table in _tables(rows, dtypes):
        console.print(table)
    for row in rows:
        if row.first_difference is not None:
            where = f"{row.operation}, {row.dtype}, against {row.oracle}: {row.cases - row.equal} of {row.cases} differ"
            console.print(
                f"{where}\n  {row.first_difference['inputs']}\n  {row.first_difference['difference']}", markup=False
            )
    of_attention = [row for row in rows if row.operation in attention.OPERATIONS]
    of_bits = [row for row in rows if row.operation not in attention.OPERATIONS]
    if of_attention:
        tolerances = ", ".join(f"{attention.tolerance(dtype)} in {dtype}" for dtype in dtypes)
        console.print(f"tolerance, relative to PyTorch in float64: {tolerances}", soft_wrap=True)
        total, differences = _totals(of_attention)
        console.print(f"{total:,} comparisons of attention, outputs and gradients: {differences} beyond the tolerance")
    if of_bits:
        total, differences = _totals(of_bits)
        console.print(f"{total:,} comparisons, bit for bit: {differences} differences")
    models: list[ModelCheck] = []
    for check in checks:
        models.append(check())
        console.print(models[-1].describe(), soft_wrap=True)
    total, differences = _totals(rows)
    if report is not None:
        content = {
            "seed": seed,
            "comparisons": total,
            "differences": differences,
            "rows": [row.__dict__ for row in rows],
            "models": [model.__dict__ for model in models],
        }
        report.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return int(differences > 0 or not all(model.agrees for model in models))


def _totals(rows: Sequence[Row]) -> tuple[int, int]:
    """How many comparisons there were, and how many differences."""
    return sum(row.cases for row in rows), sum(row.cases - row.equal for row in rows)


def _console() -> Console:
    """A terminal as wide as it is; else wide enough for the names of the operations."""
    console = Console()
    return console if console.is_terminal else Console(width=100)


def _known(option: str, names: Sequence[str] | None, known: Sequence[str]) -> Sequence[str]:
    for name in names or ():
        if name not in known:
            raise ValueError(f"{option}: {name!r} is not one of {', '.join(known)}")
    return names or known


def _tables(rows: Sequence[Row], dtypes: Sequence[str]) -> Iterator[Table]:
    """One table for all operations that have the same oracles."""
    oracles: dict[str, tuple[str, ...]] = {}
    for row in rows:
        oracles[row.operation] = tuple(dict.fromkeys((*oracles.get(row.operation, ()), row.oracle)))
    for names in dict.fromkeys(oracles.values()):
        yield _table([row for row in rows if oracles[row.operation] == names], dtypes, names)


def _table(rows: Sequence[Row], dtypes: Sequence[str], oracles: Sequence[str]) -> Table:
    relation = "within the tolerance of" if rows[0].operation in attention.OPERATIONS else "equal to"
    table = Table(title=f"results {relation} {' and '.join(oracles)}")
    table.add_column("operation", overflow="fold")
    for dtype in dtypes:
        table.add_column(dtype, justify="right")
    for operation in dict.fromkeys(row.operation for row in rows):
        cells: list[str] = []
        for dtype in dtypes:
            cell = [row for row in rows if (row.operation, row.dtype) == (operation, dtype)]
            equal, compared = sum(row.equal for row in cell), sum(row.cases for row in cell)
            cells.append(str(equal) if equal == compared else f"[bold red]{equal} of {compared}[/]")
        table.add_row(operation, *cells)
    return table
