"""A real encoder on real texts: MiniLM under jaxmask's masks in PyTorch, and MiniLM in Flax."""

from typing import Literal

import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

import jaxmask
from jaxmask.flax.models.encoder import mean_pool
from torch_compat.bridge import same_bits, to_jax, to_torch
from torch_compat.models import load
from torch_compat.verify.model_checks import Measure, ModelCheck
from torch_compat.verify.sentences import SENTENCES, TEXTS
from torch_compat.weights import minilm_folder

# How near embeddings must be to PyTorch's.
COSINE, DIFFERENCE = 0.999999, 1e-5


def check_masks(attention: Literal["eager", "sdpa"]) -> ModelCheck:
    """Run PyTorch's model with its own mask and with jaxmask's, layer by layer."""
    folder = minilm_folder()
    logging.disable_progress_bar()
    inputs = AutoTokenizer.from_pretrained(folder)(list(TEXTS), padding=True, return_tensors="pt")
    model = AutoModel.from_pretrained(folder, attn_implementation=attention, dtype=torch.float32).eval()
    valid = to_jax(inputs["attention_mask"].bool())
    # What BERT makes of the 2D mask: an additive mask for eager attention, bools for scaled_dot_product_attention.
    if attention == "eager":
        mask = jaxmask.prepare_4d_attention_mask(valid, dtype=jnp.float32)
    else:
        mask = jaxmask.Padding(valid).dense(valid.shape[1], valid.shape[1])

    def hidden_states(attention_mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            outputs = model(
                input_ids=inputs["input_ids"],
                token_type_ids=inputs["token_type_ids"],
                attention_mask=attention_mask,
                output_hidden_states=True,
            )
        return outputs.hidden_states

    expected = hidden_states(inputs["attention_mask"])
    ours = hidden_states(to_torch(mask))
    unmasked = hidden_states(torch.ones_like(inputs["attention_mask"]))
    identical, is_changed = sum(map(same_bits, expected, ours)), int(not torch.equal(expected[-1], unmasked[-1]))
    return ModelCheck(
        f"MiniLM ({attention}), {len(TEXTS)} sentences of {int(inputs['attention_mask'].sum())} tokens",
        (
            Measure.count("hidden states identical under jaxmask's mask", identical, len(expected)),
            # Otherwise the states would say nothing about masks.
            Measure.count("last state different without a mask", is_changed, 1),
        ),
    )


def check_embeddings() -> ModelCheck:
    """Embed real sentences in one padded batch, in PyTorch and in Flax: the mean of the valid hidden states."""
    folder = minilm_folder()
    logging.disable_progress_bar()
    inputs = AutoTokenizer.from_pretrained(folder)(list(SENTENCES), padding=True, return_tensors="pt")
    tokens, valid = (jnp.asarray(inputs[name].numpy(), jnp.int32) for name in ("input_ids", "attention_mask"))
    with torch.no_grad():
        theirs = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()(**inputs).last_hidden_state
    weights = inputs["attention_mask"][..., None].float()
    expected = ((theirs * weights).sum(1) / weights.sum(1)).numpy()
    encoder = load(folder)
    embed = nnx.jit(lambda encoder, tokens, valid, mask: mean_pool(encoder(tokens, mask), valid))
    ours, unmasked = (np.asarray(embed(encoder, tokens, valid, mask)) for mask in (valid, jnp.ones_like(valid)))
    lengths = valid.sum(1)
    return compare_embeddings(
        f"MiniLM in Flax, {len(SENTENCES)} sentences of {lengths.min()} to {lengths.max()} tokens in one batch",
        ours,
        unmasked,
        expected,
    )


def compare_embeddings(model: str, ours: np.ndarray, unmasked: np.ndarray, expected: np.ndarray) -> ModelCheck:
    """How near embeddings ``[sentences, dim]`` are to PyTorch's. Those without a mask must be far from them."""
    # In float64: in float32 the rounding of a cosine is as large as what is looked for.
    one, other = ours.astype(np.float64), expected.astype(np.float64)
    cosines = (one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)
    return ModelCheck(
        model,
        (
            Measure("difference from PyTorch's embeddings", float(np.abs(ours - expected).max()), at_most=DIFFERENCE),
            Measure("cosine", float(cosines.min()), at_least=COSINE),
            Measure("difference without a mask", float(np.abs(unmasked - expected).max()), at_least=100 * DIFFERENCE),
        ),
    )
