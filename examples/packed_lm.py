"""Train a language model on packed documents: the topics of Python's own documentation, byte by byte.

Rows of a fixed length hold several documents each, and a mask keeps these apart. So the loss of a row is that of its
documents one by one, as the last line shows. The model is a ``jaxmask.flax.Decoder``, the optimizer one of optax.

    python examples/packed_lm.py --steps 300 --plot loss.png
"""

# pyright: reportMissingTypeStubs=false

import argparse
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track

from jaxmask import zoo
from jaxmask.flax import Decoder, DecoderConfig, DecoderLayer

LAYERS = (DecoderLayer(), DecoderLayer(window=32), DecoderLayer(), DecoderLayer(window=32))
CONFIG = DecoderConfig(256, dim=96, hidden_dim=256, heads=4, kv_heads=2, head_dim=24, layers=LAYERS)


def documents(longest: int) -> list[np.ndarray]:
    """The paragraphs of all topics, as bytes; those that are longer are cut."""
    texts = [text for topic in topics.values() for text in topic.split("\n\n") if len(text) > 1]
    return [np.frombuffer(text.encode(), np.uint8)[:longest].astype(np.int32) for text in texts]


def pack(texts: list[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and ids of documents, ``[rows, length]``: each document goes into the row at hand, or begins another."""
    rows: list[list[np.ndarray]] = [[]]
    for text in texts:
        if sum(map(len, rows[-1])) + len(text) > length:
            rows.append([])
        rows[-1].append(text)
    most = max(map(len, rows))
    lengths = np.array([[len(text) for text in row] + [0] * (most - len(row)) for row in rows])
    tokens = np.zeros((len(rows), length), np.int32)
    for row, of_row in zip(tokens, rows, strict=True):
        joined = np.concatenate(of_row)
        row[: len(joined)] = joined
    return tokens, np.asarray(zoo.segment_ids_from_lengths(lengths, length))


def losses(model: Decoder, tokens: Any, ids: Any) -> tuple[jax.Array, jax.Array]:
    """The sum of the losses of all tokens that follow one of their document, and their number."""
    logits, _ = model(tokens, ids >= 0, mask=zoo.packed(ids))
    each = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
    counts = (ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] >= 0)
    return jnp.where(counts, each, 0).sum(), counts.sum()


def train(tokens: np.ndarray, ids: np.ndarray, steps: int, rows: int) -> tuple[Decoder, list[float], int]:
    """The model, the loss of each step, and how often the step was traced."""
    model = Decoder(CONFIG, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(optax.cosine_decay_schedule(3e-3, steps)), wrt=nnx.Param)
    traces: list[object] = []

    @nnx.jit
    def step(model: Decoder, optimizer: Any, tokens: jax.Array, ids: jax.Array) -> jax.Array:
        traces.append(tokens)

        def mean(model: Decoder) -> jax.Array:
            total, count = losses(model, tokens, ids)
            return total / count

        loss, gradients = nnx.value_and_grad(mean)(model)
        optimizer.update(model, gradients)
        return loss

    rng, found = np.random.default_rng(0), list[float]()
    for _ in track(range(steps), "training"):
        batch = rng.choice(len(tokens), rows, replace=False)
        found.append(float(step(model, optimizer, jnp.asarray(tokens[batch]), jnp.asarray(ids[batch]))))
    return model, found, len(traces)


def one_by_one(model: Decoder, tokens: np.ndarray, ids: np.ndarray) -> float:
    """The mean loss of the documents of a row, each in a row of its own."""
    texts = [tokens[ids == document] for document in range(ids.max() + 1)]
    longest = max(map(len, texts))
    alone = np.stack([np.pad(text, (0, longest - len(text))) for text in texts])
    total, count = losses(
        model, alone, zoo.segment_ids_from_lengths(np.array([[len(text)] for text in texts]), longest)
    )
    return float(total / count)


def main() -> None:
    """Train, compare, and plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--plot", type=Path, help="where to write a picture of the loss")
    arguments = parser.parse_args()
    tokens, ids = pack(documents(arguments.length), arguments.length)
    model, found, traces = train(tokens, ids, arguments.steps, arguments.rows)
    console = Console(highlight=False)
    console.print(f"loss: {found[0]:.2f} at first, {found[-1]:.2f} after {len(found)} steps, traced {traces} time(s)")
    row = ids[:100].max(1).argmax()  # with many documents
    total, count = nnx.jit(losses)(model, tokens[row : row + 1], ids[row : row + 1])
    difference = abs(float(total / count) - one_by_one(model, tokens[row], ids[row]))
    console.print(f"{ids[row].max() + 1} documents, packed and one by one: the losses differ by {difference:.0e}")
    if arguments.plot:
        figure = Figure(figsize=(6, 3.5), layout="constrained")
        ax = figure.subplots()
        ax.plot(found)
        ax.set(xlabel="step", ylabel="loss in nats a byte (lower is better)", title="packed documents")
        figure.savefig(arguments.plot)
        console.print(f"plot: {arguments.plot}")


if __name__ == "__main__":
    main()
