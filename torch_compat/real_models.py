"""Real models on real texts: PyTorch's and ours, from one checkpoint."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

from jaxmask.flax import mean_pool
from torch_compat import models
from torch_compat.cases import minilm_folder
from torch_compat.sentences import SENTENCES

# How near embeddings must be to PyTorch's.
COSINE, DIFFERENCE = 0.999999, 1e-5


@dataclass(frozen=True)
class EmbeddingsCheck:
    """How the embeddings of sentences compare, of one padded batch in PyTorch and in Flax."""

    sentences: int
    # Of the shortest and of the longest of them.
    tokens: tuple[int, int]
    lowest_cosine: float
    largest_difference: float
    # Without the padding mask they must come out different, or the comparison would say nothing about masks.
    difference_without_mask: float

    @property
    def agrees(self) -> bool:
        """Whether no user of the embeddings could tell them apart."""
        return (
            self.lowest_cosine >= COSINE
            and self.largest_difference <= DIFFERENCE
            and self.difference_without_mask > 100 * self.largest_difference
        )

    def describe(self) -> str:
        """One line for a person."""
        shortest, longest = self.tokens
        return (
            f"MiniLM in Flax, {self.sentences} sentences of {shortest} to {longest} tokens in one batch: embeddings "
            f"{'' if self.agrees else 'NOT '}within {DIFFERENCE} of PyTorch's, cosines of at least {COSINE}"
            + ("" if self.agrees else f": {self.largest_difference:.1e}, {self.lowest_cosine:.7f}")
        )


def compare_minilm() -> EmbeddingsCheck:
    """Embed real sentences by MiniLM, in PyTorch and in Flax: the mean of what is valid, before it is normed."""
    folder = minilm_folder()
    logging.disable_progress_bar()
    inputs = AutoTokenizer.from_pretrained(folder)(list(SENTENCES), padding=True, return_tensors="pt")
    tokens, valid = (jnp.asarray(inputs[name].numpy(), jnp.int32) for name in ("input_ids", "attention_mask"))
    with torch.no_grad():
        theirs = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()(**inputs).last_hidden_state
    weights = inputs["attention_mask"][..., None].float()
    expected = ((theirs * weights).sum(1) / weights.sum(1)).numpy()
    encoder = models.load(folder)
    embed = nnx.jit(lambda encoder, tokens, valid, mask: mean_pool(encoder(tokens, mask), valid))
    found, unmasked = (np.asarray(embed(encoder, tokens, valid, mask)) for mask in (valid, jnp.ones_like(valid)))
    # In float64, for in float32 a cosine of one is off by as much as is looked for.
    ours, pytorchs = found.astype(np.float64), expected.astype(np.float64)
    cosines = (ours * pytorchs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(pytorchs, axis=1)
    return EmbeddingsCheck(
        sentences=len(SENTENCES),
        tokens=(int(valid.sum(1).min()), int(valid.sum(1).max())),
        lowest_cosine=float(cosines.min()),
        largest_difference=float(np.abs(found - expected).max()),
        difference_without_mask=float(np.abs(unmasked - expected).max()),
    )
