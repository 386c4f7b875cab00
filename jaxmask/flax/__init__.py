"""What a Flax model needs of jaxmask."""

from jaxmask.flax.attention_fn import make_attention_fn

__all__ = ["make_attention_fn"]
