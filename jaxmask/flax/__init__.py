"""What a Flax model needs of jaxmask."""

from jaxmask.flax.attention_fn import make_attention_fn
from jaxmask.flax.cache import Cache, LayerCache, Seen, Step

__all__ = ["Cache", "LayerCache", "Seen", "Step", "make_attention_fn"]
