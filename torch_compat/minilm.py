"""A real model on real sentences: MiniLM's hidden states under jaxmask's masks and under Transformers' own."""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
import torch
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

import jaxmask
from torch_compat.bridge import same_bits, to_jax, to_torch
from torch_compat.cases import TEXTS, minilm_folder


@dataclass(frozen=True)
class ModelCheck:
    """How the hidden states of a model compare, layer by layer."""

    attention: str
    sentences: int
    tokens: int
    layers: int
    identical_layers: int
    # Without any mask the states must come out different, or the comparison would say nothing about masks.
    mask_matters: bool

    @property
    def agrees(self) -> bool:
        """Whether jaxmask's mask is as good as the model's own."""
        return self.identical_layers == self.layers and self.mask_matters

    def describe(self) -> str:
        """One line for a person."""
        return (
            f"MiniLM ({self.attention}), {self.sentences} sentences of {self.tokens} tokens: hidden states of "
            f"{self.identical_layers} of {self.layers} layers identical under jaxmask's mask"
            + ("" if self.mask_matters else "; and under no mask, so that this shows nothing")
        )


def check(attention: Literal["eager", "sdpa"]) -> ModelCheck:
    """Run the PyTorch model with its own mask and with one from jaxmask, handed over by DLPack."""
    folder = minilm_folder()
    logging.disable_progress_bar()
    inputs = AutoTokenizer.from_pretrained(folder)(list(TEXTS), padding=True, return_tensors="pt")
    model = AutoModel.from_pretrained(folder, attn_implementation=attention, dtype=torch.float32).eval()
    valid = to_jax(inputs["attention_mask"].bool())
    # What BERT makes of the 2D mask: an additive bias for eager attention, a bool for scaled-dot-product attention.
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

    own = hidden_states(inputs["attention_mask"])
    ours = hidden_states(to_torch(mask))
    unmasked = hidden_states(torch.ones_like(inputs["attention_mask"]))
    return ModelCheck(
        attention=attention,
        sentences=len(TEXTS),
        tokens=int(inputs["attention_mask"].sum()),
        layers=len(own),
        identical_layers=sum(map(same_bits, own, ours)),
        mask_matters=not torch.equal(own[-1], unmasked[-1]),
    )
