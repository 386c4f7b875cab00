"""jaxmask for Flax: attention, caches, reference models, and generation of text.

:func:`axis_rules` shards the models over a mesh.
"""

from jaxmask.attention_fn import make_attention_fn
from jaxmask.flax.cache import Cache, KeysAndValues, LayerCache, Seen, Step
from jaxmask.flax.models.axes import axis_rules
from jaxmask.flax.models.decoder import Decoder, DecoderConfig, DecoderLayer, Llama3Scaling, Rope
from jaxmask.flax.models.encoder import Encoder, EncoderConfig, mean_pool
from jaxmask.flax.models.generate import Generated, generate, left_pad
from jaxmask.flax.models.t5 import T5, T5Config, T5Decoder

__all__ = [
    "T5",
    "Cache",
    "Decoder",
    "DecoderConfig",
    "DecoderLayer",
    "Encoder",
    "EncoderConfig",
    "Generated",
    "KeysAndValues",
    "LayerCache",
    "Llama3Scaling",
    "Rope",
    "Seen",
    "Step",
    "T5Config",
    "T5Decoder",
    "axis_rules",
    "generate",
    "left_pad",
    "make_attention_fn",
    "mean_pool",
]
