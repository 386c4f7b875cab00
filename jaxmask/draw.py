"""Masks as pictures, to see at a glance what a description means."""

from typing import TYPE_CHECKING

import numpy as np

from jaxmask.mask import Mask, Offset

if TYPE_CHECKING:
    from rich.console import Console


def show(
    mask: Mask,
    query_length: int,
    key_length: int | None = None,
    *,
    offset: Offset | None = None,
    console: "Console | None" = None,
) -> None:
    """Print a mask in the terminal: a row for each query and a column for each key, both by their positions.

    Args:
        mask: what to draw; one panel for each example and head that it tells apart.
        query_length: static.
        key_length: static; ``query_length`` where it is left out.
        offset: as in :meth:`Mask.dense`, which raises where it is needed and missing.
        console: of rich; where to print.

    Raises:
        ImportError: rich is not installed.
        ValueError: the keys do not fit the width of the console, or :meth:`Mask.dense` raises.
    """
    try:
        from rich.console import Console
        from rich.panel import Panel
        from rich.text import Text
    except ImportError as error:
        raise ImportError('show needs rich: pip install "jaxmask[cli]"') from error

    console = Console() if console is None else console
    key_length = query_length if key_length is None else key_length
    # Distinct without colour; a console that is not UTF-8 could not print the first two.
    yes, no = ("#", ".") if console.options.ascii_only else ("■", "·")
    yes, no = Text(yes, "bold cyan"), Text(no, "bright_black")

    allowed = np.asarray(mask.dense(query_length, key_length, offset=offset))
    batch, heads = allowed.shape[:2]
    first = np.broadcast_to(np.asarray(0 if offset is None else offset).reshape(-1), batch)
    positions = first[:, None] + np.arange(query_length)
    margin = max(len(str(position)) for position in positions.flat) + 2
    room = console.width - margin - (4 if batch * heads > 1 else 0)
    if key_length > room:
        raise ValueError(
            f"{key_length} keys do not fit a console of {console.width} columns, which has room for {room}"
        )
    gap = Text(" " if 2 * key_length - 1 <= room else "")

    # Positions of keys stand upright, a digit to a row.
    keys = [str(key).rjust(len(str(key_length - 1))) for key in range(key_length)]
    header = [Text(" " * margin + gap.plain.join(digits), "bright_black") for digits in zip(*keys, strict=True)]
    for b, h in np.ndindex(batch, heads):
        rows = [
            Text(f"{position:>{margin - 2}}  ", "bright_black").append_text(
                gap.join(yes if cell else no for cell in row)
            )
            for position, row in zip(positions[b], allowed[b, h], strict=True)
        ]
        grid = Text("\n").join(header + rows)
        title = ", ".join(f"{axis} {i}" for axis, i, size in (("batch", b, batch), ("head", h, heads)) if size > 1)
        console.print(Panel(grid, title=title, title_align="left", expand=False) if title else grid)
    console.print(
        Text.assemble(yes, " may attend, ", no, f" may not: {allowed.sum():,} of {allowed.size:,} pairs may attend")
    )
    console.print(Text("rows are positions of queries, columns of keys", "bright_black"))
