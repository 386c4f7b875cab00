"""``jaxmask verify``: compare what is asked for, print how it went, and write a report."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import transformers
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from torch_compat.verify import attention, converter_cases, masking_cases, minilm, model_attention, smollm2, tiny_models
from torch_compat.verify.cases import DTYPES
from torch_compat.verify.comparison import ORACLES, Row, compare_operation, oracles_of
from torch_compat.verify.model_checks import ModelCheck
from torch_compat.weights import minilm_folder, smollm2_checkpoint


@dataclass(frozen=True)
class Group:
    """Operations that are compared in one way: their cases for each dtype, and what is said of those that agree."""

    name: str
    operations: tuple[str, ...]
    cases: int
    agree: str


GROUPS = (
    Group("modeling_attn_mask_utils", converter_cases.OPERATIONS, 120, "equal, bit for bit"),
    Group("masking_utils", masking_cases.OPERATIONS, 120, "equal, bit for bit"),
    Group("attention", attention.OPERATIONS, 12, "within the tolerance, outputs and gradients"),
)
ALL_OPERATIONS = tuple(operation for group in GROUPS for operation in group.operations)
ALL_ORACLES = ("reference", "transformers", *attention.ORACLES)
MODELS: tuple[Callable[[], ModelCheck], ...] = (
    partial(minilm.check_masks, "eager"),
    partial(minilm.check_masks, "sdpa"),
    *(partial(tiny_models.check, name) for name in tiny_models.MODELS),
    *(partial(model_attention.check, name) for name in model_attention.MASKS),
    minilm.check_embeddings,
    smollm2.check,
)


def run(
    cases: int | None = None,
    seed: int = 0,
    operations: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    oracles: Sequence[str] | None = None,
    report: Path | None = None,
    console: Console | None = None,
) -> int:
    """Compare what is asked for with PyTorch and the installed Transformers.

    A line is printed for each group of operations and for each model, a table for each group in a terminal, and every
    first difference in full.

    Args:
        cases: the number of cases for each operation and dtype; 120, and 12 for attention, where it is ``None``. Long
            attention has one.
        seed: for the generated inputs, at least 0.
        operations, dtypes, oracles: names; all of them where it is ``None``. The models are run where all of both
            are.
        report: a file for the results as JSON.
        console: prints.

    Returns:
        The exit status: 1 where anything differs, else 0.

    Raises:
        ValueError: a name is not known; no oracle is left for an operation; the number of cases is not positive, or
            the seed is negative.
        OSError: the report cannot be written there.
        ModuleNotFoundError: the weights of a model are missing.
    """
    if cases is not None and cases < 1:
        raise ValueError(f"cases must be at least 1, got {cases}")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    dtypes = _known("dtype", dtypes, tuple(DTYPES))
    oracles = _known("oracle", oracles, ALL_ORACLES)
    comparable = tuple(operation for operation in ALL_OPERATIONS if set(oracles_of(operation)) & set(oracles))
    for operation in _known("op", operations, ALL_OPERATIONS):
        if operations and operation not in comparable:
            raise ValueError(f"op: {operation!r} is compared with {' and '.join(oracles_of(operation))} alone")
    operations = operations or comparable
    checks = MODELS if operations is comparable and len(oracles) == len(ALL_ORACLES) else ()
    # What may be missing is asked for now, and not after minutes.
    if report is not None:
        report.open("a").close()
    if checks:
        minilm_folder()
        smollm2_checkpoint()
    # Wide enough for every line where it is not a terminal.
    console = console or Console(width=None if Console().is_terminal else 240)
    rows: list[Row] = []
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("", total=len(operations) * len(dtypes))
        for group in GROUPS:
            chosen = [operation for operation in operations if operation in group.operations]
            of_group: list[Row] = []
            for operation in chosen:
                progress.update(task, description=operation)
                for dtype in dtypes:
                    of_group += compare_operation(operation, dtype, oracles, cases or group.cases, seed)
                    progress.advance(task)
            if chosen:
                _print_group(console, group, of_group, dtypes)
            rows += of_group
    models: list[ModelCheck] = []
    for check in checks:
        models.append(check())
        console.print(models[-1].describe(), soft_wrap=True, highlight=False)
    _print_versions(console, rows)
    differences = sum(row.cases - row.equal for row in rows)
    if report is not None:
        content = {
            "transformers": transformers.__version__,
            "seed": seed,
            "comparisons": sum(row.cases for row in rows),
            "differences": differences,
            "rows": [row.__dict__ for row in rows],
            "models": [{**model.as_json(), "agrees": model.agrees} for model in models],
        }
        report.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return int(differences > 0 or not all(model.agrees for model in models))


def _print_group(console: Console, group: Group, rows: Sequence[Row], dtypes: Sequence[str]) -> None:
    """How a group went, in a line and its differences; in a terminal in a table, too."""
    if console.is_terminal:
        console.print(_table(group, rows, dtypes))
    equal, compared = sum(row.equal for row in rows), sum(row.cases for row in rows)
    names = " and ".join(dict.fromkeys(row.oracle for row in rows))
    count = len({row.operation for row in rows})
    console.print(
        f"{group.name}: {count} operation{'s' * (count > 1)}, {equal:,} of {compared:,} {group.agree} ({names})",
        soft_wrap=True,
        highlight=False,
    )
    for row in rows:
        if row.first_difference is not None:
            console.print(
                f"{row.operation}, {row.dtype}, against {row.oracle}: {row.cases - row.equal} of {row.cases} differ\n"
                f"  {row.first_difference['inputs']}\n  {row.first_difference['difference']}",
                soft_wrap=True,
                markup=False,
            )
    if group.name == "attention":
        tolerances = ", ".join(f"{attention.tolerance(dtype)} in {dtype}" for dtype in dtypes)
        tolerances += f"; for {attention.PALLAS} twice that in float32" if "float32" in dtypes else ""
        console.print(f"tolerance, relative to PyTorch in float64: {tolerances}", soft_wrap=True, highlight=False)


def _print_versions(console: Console, rows: Sequence[Row]) -> None:
    """The Transformers that was compared with, and where it is known to be another than jaxmask follows."""
    version = f"Transformers {transformers.__version__}"
    if known := sum(row.known for row in rows):
        console.print(
            f"{version} is known to differ in {known:,} cases, which are not counted above: there block_sequence_ids "
            "reach from one packed document into another; jaxmask follows 5.24, where they do not",
            soft_wrap=True,
            highlight=False,
        )
    missing = "" if "transformers" in ORACLES else ", which has no modeling_attn_mask_utils to compare with"
    console.print(f"compared with {version}{missing}", soft_wrap=True, highlight=False)


def _known(option: str, names: Sequence[str] | None, known: Sequence[str]) -> Sequence[str]:
    for name in names or ():
        if name not in known:
            raise ValueError(f"{option}: {name!r} is not one of {', '.join(known)}")
    return names or known


def _table(group: Group, rows: Sequence[Row], dtypes: Sequence[str]) -> Table:
    """For each operation and dtype, how many results agree."""
    table = Table(title=group.name)
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
